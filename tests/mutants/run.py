"""Apply the mutants stored here as patches, one by one, and check that tests kill them.

    python tests/mutants/run.py             all mutants
    python tests/mutants/run.py 42 50       mutants 42 and 50
    python tests/mutants/run.py --list      list them, run nothing
    python tests/mutants/run.py --renew     update the line numbers in the patches

A patch begins with lines that state its change, its consequence if shipped, the tests that kill it,
and, if the change is harmless, the reason. It can also be applied with ``patch -p1`` or
``git apply --unidiff-zero``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mutation import ROOT, Change, apply, copied_repository, find_tests, places, restored, run_tests

SECONDS = 300
FOLDER = Path(__file__).resolve().parent


class Mutant(NamedTuple):
    """A parsed patch."""

    path: Path
    number: int
    title: str
    change: Change
    tests: list[str]
    harmless: str | None


def read_mutant(path: Path) -> Mutant:
    """Read a patch that changes one place in one file.

    Raises:
        ValueError: If the change, its title, or both the tests and the reason are missing.
    """
    fields: dict[str, str] = {}
    old, new, file = [], [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("--- a/"):
            file = line.removeprefix("--- a/")
        elif file is None:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif line.startswith("-"):
            old.append(line[1:])
        elif line.startswith("+") and not line.startswith("+++ "):
            new.append(line[1:])
    tests = fields.get("Killed by", "").replace(",", " ").split()
    number = path.stem.partition("_")[0]
    if file is None or not old or "Change" not in fields:
        raise ValueError(f"{path.name}: expected a line Change: ..., followed by a patch")
    if not tests and "Harmless" not in fields:
        raise ValueError(f"{path.name}: expected a line Killed by: ... or Harmless: ...")
    change = Change(file, "\n".join(old), "\n".join(new))
    return Mutant(path, int(number), fields["Change"], change, tests, fields.get("Harmless"))


def read_mutants() -> list[Mutant]:
    """Return all mutants in order of their numbers."""
    return sorted(map(read_mutant, FOLDER.glob("*.patch")), key=lambda mutant: mutant.number)


def place_of(change: Change) -> int | None:
    """Return the line number of a change in the current file; None if it does not apply."""
    path = ROOT / change.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    starts = places(text, change.old)
    return text.count("\n", 0, starts[0]) + 1 if len(starts) == 1 else None


def as_patch(mutant: Mutant) -> str:
    """Return a patch with the line numbers of the current file."""
    head = mutant.path.read_text(encoding="utf-8").partition("--- a/")[0]
    file, old, new = mutant.change
    place = place_of(mutant.change)
    assert place is not None, f"{mutant.path.name} does not apply to {file} any more"
    removed, added = old.split("\n"), new.split("\n") if new else []
    # The diff format gives an empty range the number of the line before it.
    start = place if added else place - 1
    lines = [f"--- a/{file}", f"+++ b/{file}"]
    lines.append(f"@@ -{place},{len(removed)} +{start},{len(added)} @@")
    lines += [f"-{line}" for line in removed] + [f"+{line}" for line in added]
    return head + "\n".join(lines) + "\n"


def main() -> int:
    """Run the mutants; return 1 if a mutant with tests survives or does not apply."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="mutants to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    parser.add_argument("--renew", action="store_true", help="update the line numbers")
    options = parser.parse_args()
    mutants = [m for m in read_mutants() if not options.numbers or m.number in options.numbers]
    if options.renew:
        for mutant in mutants:
            mutant.path.write_text(as_patch(mutant), encoding="utf-8")
        return 0
    failed = 0
    with copied_repository() as folder:
        for mutant in mutants:
            line = f"{mutant.number:>2} {mutant.change.file}: {mutant.title}"
            if options.list or not mutant.tests:
                print(f"{'harmless' if mutant.harmless else 'listed':<9}{line}", flush=True)
                continue
            began, outcome = time.monotonic(), "outdated"
            with restored(folder / mutant.change.file):
                if apply(mutant.change, folder):
                    outcome = run_tests(find_tests(mutant.tests), folder, SECONDS)
            failed += outcome in ("survived", "outdated")
            print(f"{outcome:<9}{line} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
