"""``anomaly_clip report``: figures of runs side by side, or beside a published table."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from anomaly_clip.errors import UserError, nearest
from anomaly_clip.files import atomic_path, write_csv
from anomaly_clip.progress import say
from anomaly_clip.report.comparison import Made, beside_published, differences, side_by_side
from anomaly_clip.report.page import write_page
from anomaly_clip.report.published import Published, Table, published
from anomaly_clip.results.finished_run import Finished, find_runs

__all__ = ["run_report"]


def run_report(words: Sequence[str]) -> int:
    """Print and write a table and return an exit code.

    Raises:
        UserError: What is wrong, and the way out.
    """
    source = published()
    asked = _parser(source).parse_args(list(words[1:]))
    for option in ("csv", "markdown", "html"):
        file = getattr(asked, option)
        if file is not None and file.is_dir():
            raise UserError(f"--{option} {file} is a folder: name a file in it")
    table = None if asked.table is None else _table(asked.table, source)
    named = _named(asked.weights, source)
    if table is None and asked.dry_run:
        raise UserError("--dry-run lists the runs that a published table needs: name it by --table")
    if asked.page:
        return _write_pages(asked)
    if table is None and not asked.runs:
        raise UserError(
            "report: name folders of runs, or a published table by --table (there are "
            f"{', '.join(source.tables)})"
        )
    runs = find_runs(asked.runs)
    if table is not None and asked.dry_run:
        _list_commands(table, runs, source, named)
        return 0
    made = side_by_side(runs) if table is None else beside_published(table, runs, source, named)
    made.sheet.print(Console(highlight=False))
    _write(made, asked)
    return 0


def _write_pages(asked: argparse.Namespace) -> int:
    """Write the page of each run anew.

    Raises:
        UserError: If there is no run, one is damaged, or a table is asked for as well.
    """
    if not asked.runs:
        raise UserError("report --page: name folders of runs, as runs/demo/1")
    if asked.table is not None or asked.csv or asked.markdown or asked.html:
        raise UserError("report --page writes pages of runs and no table: leave out the rest")
    for folder in asked.runs:
        try:
            say(f"written: {write_page(folder.expanduser())}")
        except OSError as error:
            raise UserError(f"{folder}: the page cannot be written ({error.strerror})") from None
    return 0


def _parser(source: Published) -> argparse.ArgumentParser:
    tables = "\n".join(f"  {table.id:<26}{table.title}" for table in source.tables.values())
    parser = argparse.ArgumentParser(
        prog="anomaly_clip report",
        usage="anomaly_clip report RUN... [--table ID] [--csv FILE] [--markdown FILE] [--html FILE]"
        "\n       anomaly_clip report --table ID --dry-run"
        "\n       anomaly_clip report RUN... --page",
        description="Set the figures of runs side by side, by category; or, with --table, beside "
        "published ones, with differences.",
        epilog=f"published tables:\n{tables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of test, each or compare"
    )
    parser.add_argument("--table", metavar="ID", help="the published table")
    parser.add_argument(
        "--page", action="store_true", help="write report.html of each run anew, from its folder"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures as fractions")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table as a page")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="say what a weights file is, where nothing beside it does, as tab=tab.safetensors",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the commands of the runs that the table needs, without those of the RUNs given",
    )
    return parser


def _table(name: str, source: Published) -> Table:
    if name not in source.tables:
        hint = nearest(name, source.tables) or f"there are {', '.join(source.tables)}"
        raise UserError(f"--table {name}: there is no such table; {hint}")
    return source.tables[name]


def _named(words: Sequence[str], source: Published) -> dict[Path, str]:
    """Return what weights files are, as the command line says."""
    kinds = {row.run.weights for t in source.tables.values() for row in t.rows if row.run}
    named = {}
    for word in words:
        kind, _, file = word.partition("=")
        if kind not in kinds or not file:
            known = ", ".join(sorted(kinds))
            raise UserError(f"--weights {word}: expected KIND=FILE, with one of the kinds {known}")
        named[Path(file).expanduser().resolve()] = kind
    return named


def _list_commands(
    table: Table, runs: Sequence[Finished], source: Published, named: dict[Path, str]
) -> None:
    """Print the commands of a table's runs, each once, and the one that sets them beside it."""
    if not table.runs:
        say(f"{table.id} is for reference: no run of ours belongs to it")
        return
    folders = []
    commands: list[str] = []
    for wanted in table.runs:
        there = [run for run in runs if not differences(wanted, run, source, named)]
        folders += [str(run.folder) for run in there]
        if len(there) < wanted.draws:
            folders.append(wanted.folder)
            done = [f"--output.folder {run.folder}" for run in there]
            commands += (c for c in wanted.commands if not c.endswith(tuple(done)))
    for line in dict.fromkeys(commands):  # several detectors share a backbone
        print(line)
    print(f"anomaly_clip report {shlex.join(dict.fromkeys(folders))} --table {table.id}")


def _write(made: Made, asked: argparse.Namespace) -> None:
    """Write the files that are asked for.

    Raises:
        UserError: If one cannot be written.
    """
    pages = {"markdown": made.sheet.markdown, "html": made.sheet.html}
    for option in ("csv", *pages):
        file = getattr(asked, option)
        if file is None:
            continue
        try:
            if option == "csv":
                write_csv(file, made.records.header, made.records.rows)
            else:
                with atomic_path(file) as temporary:
                    temporary.write_text(pages[option](), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--{option} {file}: cannot be written ({error.strerror})") from None
        say(f"written: {file}")
