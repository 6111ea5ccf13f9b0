"""Comparison of runs with a published table: our metrics below each published row.

A difference is computed only between metrics over the same categories. Metrics of random or demo
weights, of a subset of the test images, or of images that were also trained on, are labelled as
such and get no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev

from anomaly_clip.reporting.comparison import (
    ComparisonTable,
    TableRows,
    column_heading,
    label_runs,
    mark_notes,
    run_legend,
    run_warnings,
)
from anomaly_clip.reporting.published import (
    PublishedCell,
    PublishedColumn,
    PublishedRow,
    PublishedTable,
    PublishedTables,
    SourcedValue,
)
from anomaly_clip.reporting.run_matching import differences, mismatch
from anomaly_clip.reporting.table import ReportTable, TableLine, TableNote
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.warnings import MARK, TRANSDUCTIVE_REMARK, WIDE_BOUNDS

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
    uncertain: bool = False
    """True if the bounds of the value are wide."""


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
        notes=[
            *_table_notes(table),
            *run_warnings(runs_by_letter),
            *mark_notes(lines, num_names=2),
        ],
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
    comparable = all(tag.comparable for tag in run.tags)
    return OurCell(value, remark, comparable, uncertain=run.is_uncertain(column.metric, over))


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
    comparable = all(cell.comparable for cell in draws)
    uncertain = any(cell.uncertain for cell in draws)
    return OurCell(fmean(values), remark, comparable, stdev(values), uncertain)


def _differences(ours: OurCell, cell: PublishedCell | None) -> list[float]:
    """Return the difference from each published value; empty if there is nothing to compare."""
    if cell is None or ours.value is None or not ours.comparable:
        return []
    return [ours.value - value for value in cell.values]


# -- lines of the readable table -------------------------------------------------------------------


def _published_line(
    table: PublishedTable, row: PublishedRow, doubt_numbers: dict[str, int]
) -> TableLine:
    """Return a published row; its doubts are numbered and explained below the table."""
    remark = TRANSDUCTIVE_REMARK if row.transductive else None
    name = row.name + _marks([row.other_data, remark, row.doubt], doubt_numbers)
    cells = []
    for cell in row.cells:
        if cell is None:
            cells.append(UNDEFINED)
            continue
        values = [f"{100 * value:.{table.digits}f}" for value in cell.values]
        marks = _marks([_sources_note(cell, values), cell.doubt], doubt_numbers)
        text = f"{' / '.join(values)}{marks}"
        if cell.spread is not None:
            text += f"\n±{100 * cell.spread:.{table.digits}f}"
        cells.append(text)
    kind = "published" if row.run is not None else "reference"
    return TableLine((name, kind, *cells), "published", first=True)


def _sources_note(cell: PublishedCell, values: Sequence[str]) -> str | None:
    """Return the source of each value; None if the only source is that of the table."""
    if not cell.sources:
        return None
    if len(values) == 1:
        return f"from {cell.sources[0].source}"
    values_by_source: dict[str, list[str]] = {}
    for value, sourced in zip(values, cell.sources, strict=True):
        values_by_source.setdefault(sourced.source, []).append(value)
    listed = (f"{' and '.join(texts)}: {source}" for source, texts in values_by_source.items())
    return f"sources disagree: {'; '.join(listed)}"


def _marks(notes: Sequence[str | None], numbers: dict[str, int]) -> str:
    """Return the numbers of notes, which are explained below the table."""
    note_numbers = (
        numbers.setdefault(note, len(numbers) + 1) for note in notes if note is not None
    )
    return "".join(f" [{number}]" for number in note_numbers)


def _our_lines(
    table: PublishedTable, row: PublishedRow, cells: Sequence[OurCell], label: str
) -> list[TableLine]:
    digits = max(table.digits, 1)
    values, difference_texts = [], []
    for ours, published in zip(cells, row.cells, strict=True):
        if ours.value is None:
            values.append(ours.remark)
        else:
            value = f"{MARK if ours.uncertain else ''}{100 * ours.value:.{digits}f}"
            spread = "" if ours.spread is None else f"±{100 * ours.spread:.{digits}f}"
            values.append("\n".join(filter(None, [value, spread, ours.remark])))
        texts = [f"{100 * value:+.{digits}f}" for value in _differences(ours, published)]
        difference_texts.append(" / ".join(texts) or UNDEFINED)
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
    origin = f"{table.source}, {table.where}"
    rows: list[list[object]] = []
    for number, (column, published) in enumerate(zip(table.columns, row.cells, strict=True)):
        ours = None if cells is None else cells[number]
        if published is None and ours is None:
            continue
        if ours is not None:
            reason = "" if ours.value is not None else ours.remark.replace("\n", " ")
            wide = WIDE_BOUNDS if ours.uncertain else ""
            note = "; ".join(filter(None, [reason, wide, *warnings]))
        else:
            reason = "reference only" if row.run is None else "not run"
            note = "; ".join([reason, *([TRANSDUCTIVE_REMARK] if row.transductive else [])])
        doubts = [table.doubt, row.other_data, row.doubt]
        sourced: Sequence[SourcedValue | None] = [None]
        if published is not None:
            sourced = published.sources or [SourcedValue(published.value, origin)]
            doubts += ["sources disagree" if len(sourced) > 1 else None, published.doubt]
        differences = [] if ours is None else _differences(ours, published)
        # One row for each published value.
        for value, difference in zip_longest(sourced, differences):
            rows.append(
                [
                    *(table.id, row.method, row.data, row.of or column.of or "all", column.metric),
                    None if value is None else value.value,
                    None if published is None else published.spread,
                    *((None, None) if ours is None else (ours.value, ours.spread)),
                    difference,
                    *((labels, weights) if runs else (None, None)),
                    note,
                    "; ".join(filter(None, doubts)),
                    origin if value is None else value.source,
                ]
            )
    return rows
