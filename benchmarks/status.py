"""Print one table of the bounds of all stored results: values, floors, goals, and what is missed.

python benchmarks/status.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, Bound, parser
from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]

SIGNS = {"at most": "<=", "at least": ">="}


class Row(NamedTuple):
    """A line of the table."""

    benchmark: str
    name: str
    value: str
    floor: str
    goal: str
    verdict: str


def verdict(bound: Bound) -> str:
    """Return whether a bound is met, and its goal as well."""
    value, goal = bound["value"], bound.get("goal")
    if value is None or bound["met"] is None:
        return "not measured"
    if not bound["met"]:
        return "MISSED"
    if goal is None:
        return "met"
    reached = value <= goal if bound["rule"] == "at most" else value >= goal
    return "goal met" if reached else "met"


def rows(name: str, content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of a result, or one without a bound."""
    if not content["bounds"]:
        yield Row(name, "(no bound)", "", "", "", "")
    for what, bound in content["bounds"].items():
        sign = SIGNS[bound["rule"]]
        value = "-" if bound["value"] is None else f"{bound['value']:.4g}"
        goal = f"{sign} {bound['goal']:.4g}" if "goal" in bound else ""
        yield Row(name, what, value, f"{sign} {bound['bound']:.4g}", goal, verdict(bound))


def origin(name: str, header: dict[str, Any]) -> str:
    """Return when and where a result was measured, on one line."""
    commit = str(header.get("commit") or "unknown commit")
    short = commit[:9] + ("-dirty" if commit.endswith("-dirty") else "")
    machine = header.get("machine") or {}
    where = machine.get("device") or machine.get("processor") or "unknown machine"
    day = str(header.get("date") or "unknown date")[:10]
    return f"{name}: {short}, {day}, {where}: {header.get('command') or 'command not recorded'}"


def _summary(count: int, missed: list[str]) -> str:
    names = ", ".join(dict.fromkeys(missed))
    return f"{len(missed)} of {count} bounds are missed{f': {names}' if names else ''}"


def _contents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(folder.glob("*.json")):
        yield file.stem, json.loads(file.read_text(encoding="utf-8"))


def _all_rows(folder: Path) -> Iterator[Row]:
    for name, content in _contents(folder):
        yield from rows(name, content)


def print_table(folder: Path = RESULTS) -> int:
    """Print the table, the origin of each result, and the missed bounds; return their number."""
    wide = None if sys.stdout.isatty() else 160
    console = Console(width=wide, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in Row._fields:
        table.add_column(
            column, justify="right" if column in ("value", "floor", "goal") else "left"
        )
    missed: list[str] = []
    count = 0
    for row in _all_rows(folder):
        table.add_row(*row, style="bold" if row.verdict == "MISSED" else None)
        count += bool(row.verdict)
        missed += [row.benchmark] * (row.verdict == "MISSED")
    console.print(table)
    console.print()
    for name, content in _contents(folder):
        console.print(origin(name, content.get("header", {})), markup=False)
    console.print()
    console.print(_summary(count, missed))
    return len(missed)


def main() -> int:
    """Print the table and return the exit status."""
    parser(__doc__).parse_args()
    print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
