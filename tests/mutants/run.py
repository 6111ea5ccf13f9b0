"""Apply the mutants that are kept here as patches, one by one, and see that tests kill them.

    python tests/mutants/run.py             all
    python tests/mutants/run.py 42 50       some, by their numbers
    python tests/mutants/run.py --list      what they are
    python tests/mutants/run.py --renew     line numbers as in today's files

A patch begins with lines that say what it changes, what would ship, which tests kill it and, of a
change that does no harm, why. ``patch -p1`` and ``git apply --unidiff-zero`` take it, too.
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
    """A patch, read."""

    path: Path
    number: int
    title: str
    change: Change
    tests: list[str]
    harmless: str | None


def read_mutant(path: Path) -> Mutant:
    """Read a patch of one place in one file.

    Raises:
        ValueError: If something is missing.
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
        raise ValueError(f"{path.name}: expected lines Change: ..., then a patch")
    if not tests and "Harmless" not in fields:
        raise ValueError(f"{path.name}: expected a line Killed by: or Harmless:")
    change = Change(file, "\n".join(old), "\n".join(new))
    return Mutant(path, int(number), fields["Change"], change, tests, fields.get("Harmless"))


def read_mutants() -> list[Mutant]:
    """Return all mutants, by their numbers."""
    return sorted(map(read_mutant, FOLDER.glob("*.patch")), key=lambda mutant: mutant.number)


def place_of(change: Change) -> int | None:
    """Return the number of a change's first line in today's file; None if it does not apply."""
    path = ROOT / change.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    starts = places(text, change.old)
    return text.count("\n", 0, starts[0]) + 1 if len(starts) == 1 else None


def as_patch(mutant: Mutant) -> str:
    """Return a patch with the line numbers of today's file."""
    head = mutant.path.read_text(encoding="utf-8").partition("--- a/")[0]
    file, old, new = mutant.change
    place = place_of(mutant.change)
    assert place is not None, f"{mutant.path.name} is outdated"
    removed, added = old.split("\n"), new.split("\n") if new else []
    # An empty range is said by the line before it.
    start = place if added else place - 1
    lines = [f"--- a/{file}", f"+++ b/{file}"]
    lines.append(f"@@ -{place},{len(removed)} +{start},{len(added)} @@")
    lines += [f"-{line}" for line in removed] + [f"+{line}" for line in added]
    return head + "\n".join(lines) + "\n"


def main() -> int:
    """Return 1 if a mutant survives or does not apply that is not said to be harmless."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="default: all")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--renew", action="store_true", help="write today's line numbers")
    asked = parser.parse_args()
    mutants = [m for m in read_mutants() if not asked.numbers or m.number in asked.numbers]
    if asked.renew:
        for mutant in mutants:
            mutant.path.write_text(as_patch(mutant), encoding="utf-8")
        return 0
    failed = 0
    with copied_repository() as folder:
        for mutant in mutants:
            line = f"{mutant.number:>2} {mutant.change.file}: {mutant.title}"
            if asked.list or not mutant.tests:
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
