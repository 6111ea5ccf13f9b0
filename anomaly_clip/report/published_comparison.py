"""Comparison of runs with a published table: our metrics below each published row.

A difference is computed only between metrics over the same categories. Metrics of random or demo
weights, of a subset of the test images, or of images that were also trained on, are labelled as
such and get no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from anomaly_clip.report.comparison import (
    ComparisonTable,
    TableRows,
    column_heading,
    label_runs,
    run_legend,
    run_warnings,
)
from anomaly_clip.report.published import (
    PublishedCell,
    PublishedColumn,
    PublishedRow,
    PublishedTable,
    PublishedTables,
)
from anomaly_clip.report.run_matching import differences, mismatch
from anomaly_clip.report.table import ReportTable, TableLine, TableNote
from anomaly_clip.results.finished_run import FinishedRun

__all__ = ["compare_with_published"]

UNDEFINED = "–"
HEADER = ["table", "method", "data", "of", "figure", "published", "deviation", "ours"]
HEADER += ["our_deviation", "difference", "run", "weights", "note", "doubt", "source"]
"""Columns of the machine-readable table."""


@dataclass(frozen=True)
class OurCell:
    """Our value of a metric, to compare with a published one."""

    value: float | None
    remark: str
    """Text below the value, or in its place if there is no value."""
    comparable: bool
    spread: float | None = None
    """Standard deviation over several runs; None for a single run."""


def compare_with_published(
    table: PublishedTable,
    runs: Sequence[FinishedRun],
    source: PublishedTables,
    weights_kinds: Mapping[Path, str] | None = None,
) -> ComparisonTable:
    """Return a published table with our metrics below each row that has a matching run.

    Args:
        table: The published table.
        runs: Runs to compare; those that match no row are listed in the legend.
        source: All published tables.
        weights_kinds: Names of the weights by file, for files without a provenance record.
    """
    kinds = weights_kinds or {}
    runs_by_letter = label_runs(runs)
    doubt_numbers: dict[str, int] = {}
    lines: list[TableLine] = []
    rows: list[list[object]] = []
    placed: set[str] = set()
    for row in table.rows:
        lines.append(_published_line(table, row, doubt_numbers))
        matching = {
            letter: run
            for letter, run in runs_by_letter.items()
            if row.run is not None and not differences(row.run, run, source, kinds)
        }
        placed.update(matching)
        cells = [
            [_our_cell(run, c, row, source) for c in table.columns] for run in matching.values()
        ]
        for letter, run, run_cells in zip(matching, matching.values(), cells, strict=True):
            label = f"ours {letter}" if len(runs) > 1 else "ours"
            lines += _our_lines(table, row, run_cells, label)
            rows += _data_rows(table, row, run_cells, [run])
        if _are_draws(list(matching.values())):
            means = [_mean_of_draws(column) for column in zip(*cells, strict=True)]
            lines += _our_lines(table, row, means, f"mean of {len(matching)}")
            rows += _data_rows(table, row, means, list(matching.values()))
        if not matching:
            if row.run is not None:
                missing = ("" if cell is None else "not run" for cell in row.cells)
                lines.append(TableLine(("", "ours", *missing), "missing"))
            rows += _data_rows(table, row, None, [])
    unplaced = [
        TableNote(mismatch(table, run, source, kinds), loud=True)
        for letter, run in runs_by_letter.items()
        if letter not in placed
    ]
    doubts = [TableNote(f"[{number}] {text}") for text, number in doubt_numbers.items()]
    reference = (
        []
        if table.runs
        else [TableNote("For reference only: no run of this project corresponds to a row.")]
    )
    report_table = ReportTable(
        title=f"{table.title} ({table.id}), percent",
        notes=[*_table_notes(table), *run_warnings(runs_by_letter)],
        headings=["method", "", *(column_heading(c.metric, c.of or "") for c in table.columns)],
        lines=lines,
        legend=[*doubts, *reference, *unplaced, *run_legend(runs_by_letter)],
        num_names=2,
    )
    return ComparisonTable(report_table, TableRows(HEADER, rows))


def _table_notes(table: PublishedTable) -> list[TableNote]:
    """Return notes on the source, the protocol and the doubts of a published table."""
    notes = [
        TableNote(f"{table.source}, {table.where}"),
        TableNote(f"Protocol: {table.protocol}"),
    ]
    return notes if table.doubt is None else [*notes, TableNote(f"Uncertain: {table.doubt}")]


# -- cells -----------------------------------------------------------------------------------------


def _our_cell(
    run: FinishedRun, column: PublishedColumn, row: PublishedRow, source: PublishedTables
) -> OurCell:
    """Return a run's metric for a cell, or the reason why it is missing."""
    of = row.of or column.of
    over = source.categories(row.data, of) or tuple(run.expected)
    value, count = run.mean(column.metric, over)
    if of is None and not set(run.categories) <= set(over):
        return OurCell(None, "other\ncategories", False)
    if not set(over) & set(run.categories):
        return OurCell(None, "failed" if set(over) & set(run.failed) else "not run", False)
    if value is None and count:
        return OurCell(None, f"{count} of {len(over)}\ncategories", False)
    if value is None:
        return OurCell(None, UNDEFINED, False)
    remark = ",\n".join(tag.short for tag in run.tags)
    return OurCell(value, remark, all(tag.comparable for tag in run.tags))


def _are_draws(runs: Sequence[FinishedRun]) -> bool:
    """Return whether one row has several runs that differ only in seeds, and can be averaged."""
    seeds = {run.seeds for run in runs}
    return len(runs) > 1 and len(seeds) == len(runs) and len({run.settings for run in runs}) == 1


def _mean_of_draws(draws: Sequence[OurCell]) -> OurCell:
    """Return the mean of a metric over runs; it has no value if any run lacks the metric."""
    values = [cell.value for cell in draws if cell.value is not None]
    if len(values) < len(draws):
        return OurCell(None, f"{len(values)} of {len(draws)}\nruns", False)
    remark = ",\n".join(dict.fromkeys(cell.remark for cell in draws if cell.remark))
    return OurCell(fmean(values), remark, all(cell.comparable for cell in draws), stdev(values))


def _difference(ours: OurCell, cell: PublishedCell | None) -> float | None:
    if cell is None or ours.value is None or not ours.comparable:
        return None
    return ours.value - cell.value


# -- lines of the readable table -------------------------------------------------------------------


def _published_line(
    table: PublishedTable, row: PublishedRow, doubt_numbers: dict[str, int]
) -> TableLine:
    """Return a published row; its doubts are numbered and explained below the table."""
    cells = []
    for cell in row.cells:
        if cell is None:
            cells.append(UNDEFINED)
            continue
        text = f"{100 * cell.value:.{table.digits}f}{_doubt_mark(cell.doubt, doubt_numbers)}"
        if cell.spread is not None:
            text += f"\n±{100 * cell.spread:.{table.digits}f}"
        cells.append(text)
    kind = "published" if row.run is not None else "reference"
    name = row.name + _doubt_mark(row.doubt, doubt_numbers)
    return TableLine((name, kind, *cells), "published", first=True)


def _doubt_mark(doubt: str | None, numbers: dict[str, int]) -> str:
    return "" if doubt is None else f" [{numbers.setdefault(doubt, len(numbers) + 1)}]"


def _our_lines(
    table: PublishedTable, row: PublishedRow, cells: Sequence[OurCell], label: str
) -> list[TableLine]:
    digits = max(table.digits, 1)
    values, difference_texts = [], []
    for ours, published in zip(cells, row.cells, strict=True):
        if ours.value is None:
            values.append(ours.remark)
        else:
            value = f"{100 * ours.value:.{digits}f}"
            spread = "" if ours.spread is None else f"±{100 * ours.spread:.{digits}f}"
            values.append("\n".join(filter(None, [value, spread, ours.remark])))
        difference = _difference(ours, published)
        text = UNDEFINED if difference is None else f"{100 * difference:+.{digits}f}"
        difference_texts.append(text)
    return [
        TableLine(("", label, *values), "ours"),
        TableLine(("", "difference", *difference_texts), "difference"),
    ]


# -- machine-readable rows -------------------------------------------------------------------------


def _data_rows(
    table: PublishedTable,
    row: PublishedRow,
    cells: Sequence[OurCell] | None,
    runs: Sequence[FinishedRun],
) -> list[list[object]]:
    """Return a row's machine-readable cells for one run, for the mean of several, or for no run."""
    labels = ", ".join(run.label for run in runs)
    weights = ", ".join(dict.fromkeys(run.weights for run in runs))
    warnings = list(dict.fromkeys(tag.long for run in runs for tag in run.tags))
    rows: list[list[object]] = []
    for number, (column, published) in enumerate(zip(table.columns, row.cells, strict=True)):
        ours = None if cells is None else cells[number]
        if published is None and ours is None:
            continue
        if ours is not None:
            reason = "" if ours.value is not None else ours.remark.replace("\n", " ")
            note = "; ".join(filter(None, [reason, *warnings]))
        else:
            note = "reference only" if row.run is None else "not run"
        doubts = [table.doubt, row.doubt, None if published is None else published.doubt]
        rows.append(
            [
                *(table.id, row.method, row.data, row.of or column.of or "all", column.metric),
                *((None, None) if published is None else (published.value, published.spread)),
                *((None, None) if ours is None else (ours.value, ours.spread)),
                None if ours is None else _difference(ours, published),
                *((labels, weights) if runs else (None, None)),
                note,
                "; ".join(filter(None, doubts)),
                f"{table.source}, {table.where}",
            ]
        )
    return rows
