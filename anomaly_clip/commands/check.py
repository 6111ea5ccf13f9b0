"""``anomaly_clip check``: says what is wrong with a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import anomaly_clip.data  # noqa: F401  (short names work for classes that are imported)
from anomaly_clip.data.check import Checked, Row, check_data
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.info import DataFacts
from anomaly_clip.errors import translated
from anomaly_clip.files import write_json

__all__ = ["run_check"]

PROBLEMS_FOUND = 1


def run_check(words: Sequence[str]) -> int:
    """Check a data set as the command line says.

    Returns:
        0 if nothing is wrong with it, 1 if something is.

    Raises:
        UserError: What is wrong with the command line, where, and the way out.
    """
    parser = LightningArgumentParser(
        prog="anomaly_clip check",
        description="Read a data set whole and say what is wrong with it: counts against the "
        "published ones, unreadable files, masks that do not fit, equal files, and training images "
        "in the test split. Exit code 1 if something is wrong.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a file with a section data")
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    parser.add_argument(
        "--near_duplicates",
        type=bool,
        default=False,
        help="also look for test images that nearly equal a training image",
    )
    parser.add_argument("--json", type=str, help="write all findings to this file; - prints them")
    parser.add_argument("--workers", type=int, help="threads that read; default: one a core")
    with translated(lambda: [f"--{action.dest}" for action in parser._actions]):
        config = parser.parse_args(list(words)[1:])
        if config.workers is not None and config.workers < 1:
            raise ValueError(f"--workers must be 1 or more, got {config.workers}")
        if config.json not in (None, "-") and Path(config.json).is_dir():
            raise ValueError(f"--json {config.json} is a folder: name a file in it")
        data: AnomalyData = parser.instantiate(config).data
        checked = check_data(data, config.workers, config.near_duplicates)
        if config.json == "-":
            print(json.dumps(checked.as_json(), indent=2, ensure_ascii=False))
        else:
            show(checked, data.facts)
            if config.json is not None:
                write_json(Path(config.json), checked.as_json())
    rate = checked.images / max(checked.seconds, 1e-9)
    print(
        f"{checked.images} images in {checked.seconds:.1f} s, {rate:.0f} a second", file=sys.stderr
    )
    return PROBLEMS_FOUND if checked.problems else 0


def show(checked: Checked, facts: DataFacts) -> None:
    """Print a table, what is wrong, what is worth knowing, and where the data set comes from."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(_table(checked))
    for name, value in (
        ("source", facts.url),
        ("licence", facts.licence),
        ("to cite", facts.citation),
    ):
        if value:
            console.print(f"{name}: {value}")
    console.print(f"duplicates: {checked.duplicates}{_in_groups(checked)}")
    for remark in checked.remarks:
        console.print(f"remark: {remark}")
    if not checked.problems:
        console.print("nothing is wrong", style="bold green")
        return
    number = len(checked.problems)
    console.print(f"{number} {'problem' if number == 1 else 'problems'}:", style="bold red")
    for problem in sorted(checked.problems):
        console.print(f"  {problem.path}: {problem.message}")


def _in_groups(checked: Checked) -> str:
    if not checked.duplicates:
        return ""
    return f" files beyond the first of {checked.groups} groups of equal content"


def _table(checked: Checked) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(f"{checked.data}, {checked.root}"))
    for heading, justify in (
        ("category", "left"),
        ("split", "left"),
        ("normal", "right"),
        ("anomalous", "right"),
        ("pixels", "left"),
        ("modes", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in checked.rows:
        modes = ", ".join(f"{mode} {count}" for mode, count in row.modes.items())
        table.add_row(Text(row.category), row.split, *_numbers(row), row.sizes, modes)
    return table


def _numbers(row: Row) -> list[Text]:
    """Return the counts; beside those that differ the published ones."""
    found = (row.normal, row.anomalous)
    if row.published is None or row.published == found:
        return [Text(str(number)) for number in found]
    return [
        Text(str(own)) if own == other else Text(f"{own} of {other}", style="red")
        for own, other in zip(found, row.published, strict=True)
    ]
