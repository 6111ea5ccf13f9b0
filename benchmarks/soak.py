"""Soak test: kills, several processes, full disks, and fuzzed files; exit status 1 if one fails.

python benchmarks/soak.py                         all parts
python benchmarks/soak.py --only fuzz --count 1000 --seed 7
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from common import RESULTS, at_most, commit, parser, result
from soak_common import Row
from soak_full import WRITERS, full_disks
from soak_fuzz import KEPT, fuzz
from soak_kills import kills
from soak_processes import processes

PARTS: dict[str, tuple[Callable[[int, int, int], Iterator[Row]], int, str]] = {
    "kills": (kills, 50, "SIGKILL at so many steps, and inside half as many saves"),
    "processes": (processes, 3, "processes at most"),
    "full": (full_disks, len(WRITERS), "kinds of files"),
    "fuzz": (fuzz, 100_000, "damaged files"),
}
"""Function of (count, seed, jobs), default count, and the meaning of the count."""

HEAD = "| part | case | how | tried | failed | notes |\n|---|---|---|---|---|---|"


def main() -> int:
    """Run the parts, print the table, write the result and return the exit status."""
    counts = "; ".join(f"{name}: {count}, {help}" for name, (_, count, help) in PARTS.items())
    options = parser(__doc__)
    options.add_argument("--only", action="append", choices=list(PARTS), help="run these parts")
    options.add_argument("--count", type=int, metavar="N", help=f"number of trials ({counts})")
    options.add_argument("--seed", type=int, default=0, help="seed of all parts")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at a time")
    options.add_argument(
        "--output",
        type=Path,
        help="file of the result, in which the other parts stay (default: none with --count, "
        "benchmarks/results/soak.json otherwise)",
    )
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    names = chosen.only or list(PARTS)
    with tempfile.TemporaryDirectory(prefix="anomaly_clip_soak_") as folder:
        tempfile.tempdir = folder  # processes that are killed remove nothing
        try:
            return _run(chosen, names)
        finally:
            tempfile.tempdir = None


def _run(chosen: argparse.Namespace, names: Sequence[str]) -> int:
    print(HEAD, flush=True)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for name in names:
        start = time.monotonic()
        run, count, _ = PARTS[name]
        for row in run(chosen.count or count, chosen.seed, max(1, chosen.jobs)):
            print(row.line(), flush=True)
            rows.append(row)
        seconds[name] = round(time.monotonic() - start, 1)
    failures = [
        {"case": row.case, "how": row.how, **entry} for row in rows for entry in row.failures
    ]
    for failure in failures:
        print(json.dumps(failure, ensure_ascii=False))
    tried = sum(row.tried for row in rows)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    if failures:
        print(f"inputs: {KEPT}")
    print(f"{tried:,} tried, {len(failures)} failed ({spent})")
    file = chosen.output or (None if chosen.count else RESULTS / "soak.json")
    if file is not None:
        _write(file, rows, seconds, chosen.seed)
    return int(bool(failures))


def _write(file: Path, rows: Sequence[Row], seconds: Mapping[str, float], seed: int) -> None:
    """Write the result; parts that were not run stay as they are in the file."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    parts = {name: before["parts"][name] for name in PARTS if name in before.get("parts", {})}
    for name, value in seconds.items():
        records = [row.record() for row in rows if row.part == name]
        parts[name] = {"commit": commit(), "seed": seed, "seconds": value, "rows": records}
    parts = {name: parts[name] for name in PARTS if name in parts}
    failed = sum(len(row["failures"]) for part in parts.values() for row in part["rows"])
    content = result("soak", {"parts": parts}, {"failures": at_most(failed, 0)})
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
