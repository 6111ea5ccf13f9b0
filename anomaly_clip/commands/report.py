"""``anomaly_clip report``: metrics of runs side by side or next to a published table, and more.

The other modes rewrite pages, state the protocol of runs, and repeat runs to verify their metrics.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from anomaly_clip.errors import UserError
from anomaly_clip.progress import say
from anomaly_clip.reporting.comparison import ComparisonTable, compare_runs
from anomaly_clip.reporting.protocol import protocol_report
from anomaly_clip.reporting.published import PublishedTable, PublishedTables
from anomaly_clip.reporting.published_comparison import compare_with_published
from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.reporting.report import (
    FORMATS,
    check_files,
    find_table,
    weights_by_file,
    write_files,
)
from anomaly_clip.reporting.run_matching import differences
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.folder import find_run
from anomaly_clip.results.run_reader import find_runs

__all__ = ["run_report"]


def run_report(words: Sequence[str]) -> int:
    """Print and write a table, or rewrite the pages of runs; return an exit code.

    Raises:
        UserError: If the command line is invalid, or a run or file cannot be read or written.
    """
    source = load_published()
    options = _parser(source).parse_args(list(words[1:]))
    check_files(_files(options))
    table = None if options.table is None else find_table(options.table, source)
    weights_kinds = weights_by_file(options.weights, source)
    if table is None and options.dry_run:
        raise UserError(
            "--dry-run lists the runs that a published table needs: name the table with --table "
            f"({', '.join(source.tables)})"
        )
    _check_modes(options)
    if options.page:
        return _write_pages(options)
    if options.verify:
        # Only this mode needs methods and data sets, whose import takes seconds.
        from anomaly_clip.commands.verify import verify_runs

        moved = {"data.root": options.data_root, "data.auxiliary.root": options.auxiliary_root}
        given = {key: str(root) for key, root in moved.items() if root is not None}
        tolerance = _number(options.tolerance)
        comparison, code = verify_runs(find_runs(options.runs), given, options.allow, tolerance)
        comparison.table.print()
        _write_files(comparison, options)
        return code
    if table is None and not options.runs:
        raise UserError(
            "report: give folders of runs, or name a published table with --table "
            f"({', '.join(source.tables)})"
        )
    runs = find_runs(options.runs)
    if options.protocol:
        comparison = protocol_report(runs)
    elif table is None:
        comparison = compare_runs(runs)
    elif options.dry_run:
        _list_commands(table, runs, source, weights_kinds)
        return 0
    else:
        comparison = compare_with_published(table, runs, source, weights_kinds)
    comparison.table.print()
    _write_files(comparison, options)
    return 0


MODES = ("page", "protocol", "verify")
"""Options that replace the table of metrics."""
OF_TABLES = ("table", "weights", "dry_run")
OF_VERIFY = ("data_root", "auxiliary_root", "allow", "tolerance")


def _check_modes(options: argparse.Namespace) -> None:
    """Check that options of different modes are not combined.

    Raises:
        UserError: If they are, or if a mode gets no run.
    """
    unset = ("None", "False", "[]")
    given = [name for name, value in vars(options).items() if repr(value) not in unset]
    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise UserError(f"report --{modes[0]} and --{modes[1]}: give one of them at a time")
    mode = modes[0] if modes else None
    for name in given:
        if name in OF_VERIFY and mode != "verify":
            raise UserError(
                f"report {_typed(name)} is an option of --verify: add --verify, or leave it out"
            )
        if name in OF_TABLES and mode in ("protocol", "verify"):
            raise UserError(f"report --{mode} shows no published table: leave out {_typed(name)}")
    if mode is not None and not options.runs:
        raise UserError(
            f"report --{mode}: expected folders of runs, such as runs/demo/1-test, got none"
        )


def _number(word: str | None) -> float | None:
    """Return the value of ``--tolerance``; None if it is not given."""
    try:
        return None if word is None else float(word)
    except ValueError:
        raise UserError(f"report --tolerance: expected a number such as 1e-4, got {word}") from None


def _typed(name: str) -> str:
    """Return an option as typed."""
    special = {"data_root": "--data.root", "auxiliary_root": "--data.auxiliary.root"}
    return special.get(name, f"--{name.replace('_', '-')}")


def _write_pages(options: argparse.Namespace) -> int:
    """Rewrite the page of each run.

    Raises:
        UserError: If a run is damaged, or a table is requested as well.
    """
    if options.table is not None or options.csv or options.markdown or options.html:
        given = [
            f"--{name}" for name in ("table", "csv", "markdown", "html") if vars(options)[name]
        ]
        raise UserError(
            f"report --page writes pages of runs and no table: leave out {', '.join(given)}"
        )
    from anomaly_clip.reporting.page import write_page  # tables need no torch

    for folder in options.runs:
        try:
            say(f"written: {write_page(find_run(folder.expanduser()))}")
        except OSError as error:
            raise UserError(f"{folder}: the page cannot be written ({error.strerror})") from None
    return 0


def _parser(source: PublishedTables) -> argparse.ArgumentParser:
    tables = "\n".join(f"  {table.id:<26}{table.title}" for table in source.tables.values())
    parser = argparse.ArgumentParser(
        prog="anomaly_clip report",
        usage="anomaly_clip report RUN... [--table ID] [--csv FILE] [--markdown FILE] [--html FILE]"
        "\n       anomaly_clip report --table ID --dry-run"
        "\n       anomaly_clip report RUN... --page"
        "\n       anomaly_clip report RUN... --protocol [--csv FILE] [--markdown FILE] ..."
        "\n       anomaly_clip report RUN... --verify [--data.root FOLDER] [--tolerance X]",
        description="Show the metrics of runs side by side, per category. With --table, show them "
        "next to published results, with the differences. --protocol states what a paper must say "
        "of the runs; --verify repeats them and compares every metric.",
        epilog=f"published tables:\n{tables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of test, each or compare"
    )
    parser.add_argument("--table", metavar="ID", help="one of the published tables below")
    parser.add_argument(
        "--page", action="store_true", help="rewrite report.html of each run from its folder"
    )
    parser.add_argument(
        "--protocol",
        action="store_true",
        help="state data, weights, resolution, seeds, metrics and software, from metrics.json",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="repeat each run from its folder, in a temporary folder, and compare every metric; "
        "exit code 1 if one differs, 2 if a run cannot be repeated",
    )
    parser.add_argument(
        "--data.root",
        dest="data_root",
        type=Path,
        metavar="FOLDER",
        help="with --verify: where the data is now",
    )
    parser.add_argument(
        "--data.auxiliary.root",
        dest="auxiliary_root",
        type=Path,
        metavar="FOLDER",
        help="with --verify: where the auxiliary data is now",
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        help="with --verify: largest difference of a metric, as a fraction; default: 1e-9",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CLASS",
        help="with --verify: a class outside this package that the run may import, such as "
        "my_module.MyMethod",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all metrics, as fractions")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table as a web page")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="kind of the weights in FILE, if FILE has no record, such as tab=tab.safetensors",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the commands of those runs of the table that are not among the given RUNs",
    )
    return parser


def _list_commands(
    table: PublishedTable,
    runs: Sequence[FinishedRun],
    source: PublishedTables,
    weights_kinds: dict[Path, str],
) -> None:
    """Print the commands of a table's missing runs, then the command that compares all runs."""
    if not table.runs:
        say(f"{table.id} is for reference only: no run of this project belongs to it")
        return
    folders = []
    commands: list[str] = []
    for spec in table.runs:
        matching = [run for run in runs if not differences(spec, run, source, weights_kinds)]
        folders += [str(run.folder) for run in matching]
        if len(matching) < spec.draws:
            folders.append(spec.folder)
            done = [f"--output.folder {run.folder}" for run in matching]
            commands += (c for c in spec.commands if not c.endswith(tuple(done)))
    for line in dict.fromkeys(commands):  # several runs train the same backbone first
        print(line)
    print(f"anomaly_clip report {shlex.join(dict.fromkeys(folders))} --table {table.id}")


def _write_files(comparison: ComparisonTable, options: argparse.Namespace) -> None:
    """Write the files given by ``--csv``, ``--markdown`` and ``--html``.

    Raises:
        UserError: If a file cannot be written.
    """
    for file in write_files(comparison, _files(options)):
        say(f"written: {file}")


def _files(options: argparse.Namespace) -> dict[str, Path | None]:
    return {name: getattr(options, name) for name in FORMATS}
