"""``anomaly_clip check``: a report of all problems of a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip.commands.parsing import data_parser, parse_words
from anomaly_clip.data.check import CheckedSplit, CheckReport, check_data
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.info import DatasetInfo
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import json_text, printable, write_json
from anomaly_clip.progress import show_table

__all__ = ["run_check"]

PROBLEMS_FOUND = 1


def run_check(words: Sequence[str]) -> int:
    """Check the data set given on the command line.

    Returns:
        0 if it has no problems, 1 otherwise.

    Raises:
        UserError: If the command line is invalid.
    """
    parser = data_parser(
        "check",
        "Read all files of a data set and report its problems: image counts that differ from the "
        "published ones, unreadable files, masks of the wrong size, duplicate images, and training "
        "images in the test split, also those that were saved again without loss. The exit code is "
        "1 if it finds a problem.",
    )
    parser.add_argument(
        "--near_duplicates",
        type=bool,
        default=False,
        help="also report test images that are nearly identical to a training image",
    )
    parser.add_argument(
        "--json", type=str, help="write the report as JSON to this file; - prints it"
    )
    parser.add_argument(
        "--workers", type=int, help="number of reader threads; default: one per core"
    )
    with parse_words(parser, words) as config:
        if config.workers is not None:
            check_at_least("--workers", config.workers, 1)
        if config.json not in (None, "-") and Path(config.json).is_dir():
            raise ValueError(f"--json {config.json} is a folder: name a file in it")
        data: AnomalyData = parser.instantiate(config).data
        report = check_data(data, config.workers, config.near_duplicates)
        if config.json == "-":
            print(_encodable(json_text(report.as_json())))
        else:
            show(report, data.info)
            if config.json is not None:
                write_json(Path(config.json), report.as_json())
    rate = report.images / max(report.seconds, 1e-9)
    print(
        f"{report.images} images in {report.seconds:.1f} s, {rate:.0f} per second", file=sys.stderr
    )
    return PROBLEMS_FOUND if report.problems else 0


def _encodable(text: str) -> str:
    """Return JSON that the encoding of standard output can express."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2)
    return text


def show(report: CheckReport, info: DatasetInfo) -> None:
    """Print the counts, the origin of the data set, remarks, and all problems."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    show_table(_counts_table(report), console)
    for name, value in (
        ("source", info.url),
        ("licence", info.licence),
        ("to cite", info.citation),
    ):
        if value and report.published:
            console.print(f"{name}: {value}")
    console.print(f"duplicates: {report.duplicates}{_in_groups(report)}")
    for remark in report.remarks:
        console.print(printable(f"remark: {remark}"))
    if not report.problems:
        console.print("no problems found", style="bold green")
        return
    number = len(report.problems)
    console.print(f"{number} {'problem' if number == 1 else 'problems'}:", style="bold red")
    for problem in sorted(report.problems):
        console.print(f"  {problem.path}: {problem.message}")


def _in_groups(report: CheckReport) -> str:
    if not report.duplicates:
        return ""
    return f" extra copies in {report.groups} groups of identical files"


def _counts_table(report: CheckReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(printable(f"{report.data}, {report.root}")))
    for heading, justify in (
        ("category", "left"),
        ("split", "left"),
        ("normal", "right"),
        ("anomalous", "right"),
        ("pixels", "left"),
        ("modes", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in report.rows:
        modes = ", ".join(f"{mode} {count}" for mode, count in row.modes.items())
        table.add_row(
            Text(printable(row.category)), row.split, *_count_cells(row), row.sizes, modes
        )
    return table


def _count_cells(row: CheckedSplit) -> list[Text]:
    """Return the counts as cells, followed by the published count where it differs."""
    counts = (row.normal, row.anomalous)
    if not row.labelled:
        return [Text(f"{row.normal} without labels"), Text("-")]
    if row.published is None or row.published == counts:
        return [Text(str(count)) for count in counts]
    return [
        Text(str(count)) if count == published else Text(f"{count} of {published}", style="red")
        for count, published in zip(counts, row.published, strict=True)
    ]
