"""Comparison of runs with each other: one table with metrics per category and their means.

A mean is given only if no category is missing. Metrics of random or demo weights, of a subset of
the test images, or of images that were also trained on, are labelled as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import NamedTuple

from anomaly_clip.errors import UserError
from anomaly_clip.metric_values import CLASS_METRICS, METRICS
from anomaly_clip.reporting.metrics_table import heading, marked_percent
from anomaly_clip.reporting.option_differences import OptionDifference, differing_options
from anomaly_clip.reporting.protocol_text import LABELS, value_text
from anomaly_clip.reporting.table import ReportTable, TableLine, TableNote, has_mark
from anomaly_clip.results.finished_run import FinishedRun, printable
from anomaly_clip.results.warnings import (
    MARK,
    UNCERTAIN_WARNING,
    WIDE_BOUNDS,
    transductive_remark,
)

__all__ = [
    "ComparisonTable",
    "TableRows",
    "column_heading",
    "compare_runs",
    "label_runs",
    "mark_notes",
    "run_legend",
    "run_warnings",
]

PRINTED_METRICS = ("image_auroc", "pixel_auroc", *CLASS_METRICS)
"""Metrics printed for several runs, if available. A single run's table and the files have all."""
MAX_OPTIONS, MAX_LABELS = 12, 2
"""Maximum number of differing options above a table, and in the headings of its columns."""
LONGEST_LABEL = 16
"""Characters of the longest value in the heading of a column."""
DIFFERENCE = "B - A"
"""Heading and name of the difference of two runs."""
MAX_NAMES = 3
"""Maximum number of names listed in a message."""


class TableRows(NamedTuple):
    """Machine-readable table, with metrics as fractions."""

    header: list[str]
    rows: list[list[object]]


class ComparisonTable(NamedTuple):
    """A comparison as a readable table and as machine-readable rows."""

    table: ReportTable
    data: TableRows


def compare_runs(runs: Sequence[FinishedRun]) -> ComparisonTable:
    """Return the metrics of runs per category, and their means.

    Raises:
        UserError: If the runs have different categories.
    """
    categories = _common_categories(runs)
    runs_by_letter = label_runs(runs)
    metrics = _in_order({metric for run in runs for metric in run.metrics})
    differing = differing_options(runs)
    columns: list[tuple[str, str, FinishedRun | None]] = []
    for metric in metrics:
        columns += [(metric, letter, run) for letter, run in runs_by_letter.items()]
        columns += [(metric, DIFFERENCE, None)] if len(runs) == 2 else []
    ranked_by = next((metric for metric in metrics if _has_any(runs[0], metric)), metrics[0])
    lines = [
        TableLine(
            (
                printable(category),
                *(
                    _difference_cell(runs, metric, category)
                    if run is None
                    else _category_cell(run, metric, category)
                    for metric, _, run in columns
                ),
            ),
            "category",
            rank=_value(runs[0], ranked_by, category),
        )
        for category in categories
    ]
    means = (
        _difference_cell(runs, metric, None) if run is None else _mean_cell(run, metric)
        for metric, _, run in columns
    )
    lines.append(TableLine(("mean", *means), "mean"))
    printed = [n for n, (metric, _, _) in enumerate(columns, start=1) if metric in PRINTED_METRICS]
    number = f"{len(categories)} {'category' if len(categories) == 1 else 'categories'}"
    headings = (
        column_heading(metric, _column_label(runs_by_letter, letter, differing))
        for metric, letter, _ in columns
    )
    table = ReportTable(
        title=f"{_methods_and_data(runs)}: {number}, percent",
        notes=[
            *_option_notes(differing, list(runs_by_letter)),
            *run_warnings(runs_by_letter),
            *_setting_notes(runs_by_letter),
            *mark_notes(lines, num_names=1),
        ],
        headings=["category", *headings],
        lines=lines,
        legend=run_legend(runs_by_letter),
        printed=[0, *printed] if len(runs) > 1 and printed else None,
        ranked_by=heading(ranked_by).replace("\n", " "),
    )
    return ComparisonTable(table, _data_rows(runs, categories, metrics))


def _methods_and_data(runs: Sequence[FinishedRun]) -> str:
    """Return the tested methods and their data sets as text."""
    methods, data = (
        list(dict.fromkeys(names))
        for names in zip(*((run.method, run.data) for run in runs), strict=True)
    )
    return f"{printable(', '.join(methods))} on {printable(', '.join(data))}"


def _has_any(run: FinishedRun, metric: str) -> bool:
    return any(metrics.get(metric) is not None for metrics in run.categories.values())


def _common_categories(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the categories that all runs share, including failed categories.

    Raises:
        UserError: If the categories of a run differ from those of the first run.
    """
    first = {*runs[0].categories, *runs[0].failed}
    for run in runs[1:]:
        other = {*run.categories, *run.failed}
        if other != first:
            differences = (_only(first - other, runs[0]), _only(other - first, run))
            raise UserError(
                f"{runs[0].label} and {run.label} have different categories "
                f"({'; '.join(filter(None, differences))}): compare runs of "
                f"the same categories, or compare these runs with a published table (--table)"
            )
    return list(dict.fromkeys([*runs[0].categories, *runs[0].failed]))


def _only(names: set[str], run: FinishedRun) -> str:
    if not names:
        return ""
    listed = ", ".join(printable(name) for name in sorted(names)[:MAX_NAMES])
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"only {run.label} has {listed}{more}"


def _category_cell(run: FinishedRun, metric: str, category: str) -> str:
    if category not in run.categories:
        return "failed"
    return _marked(run, metric, category, _value(run, metric, category))


def _marked(run: FinishedRun, metric: str, row: str, value: float | None) -> str:
    """Return a metric in percent, marked if its bounds are wide."""
    return marked_percent({metric: value}, [metric], run.uncertain.get(row, ()))[0]


def _value(run: FinishedRun, metric: str, category: str) -> float | None:
    return run.categories.get(category, {}).get(metric)


def _mean_cell(run: FinishedRun, metric: str) -> str:
    value, count = run.mean(metric, run.expected)
    if value is None and count:
        return f"incomplete\n({count} of {len(run.expected)})"
    return _marked(run, metric, "mean", value)


def _difference(runs: Sequence[FinishedRun], metric: str, category: str | None) -> float | None:
    """Return a metric of the second run minus that of the first; None if either is undefined.

    Args:
        runs: Two runs.
        metric: The metric.
        category: The category; None: the mean.
    """
    first, second = (
        run.mean(metric, run.expected)[0] if category is None else _value(run, metric, category)
        for run in runs
    )
    return None if first is None or second is None else second - first


def _difference_cell(runs: Sequence[FinishedRun], metric: str, category: str | None) -> str:
    """Return a difference in percentage points, marked if a metric has wide bounds."""
    difference = _difference(runs, metric, category)
    row = "mean" if category is None else category
    is_uncertain = any(metric in run.uncertain.get(row, ()) for run in runs)
    if difference is None:
        return "–"
    return f"{MARK if is_uncertain else ''}{100 * difference:+.1f}"


def _option_notes(differing: Sequence[OptionDifference], letters: Sequence[str]) -> list[TableNote]:
    """Return a line per option that differs."""
    notes = [
        TableNote(
            f"{name}: "
            + " | ".join(f"{letter} {value}" for letter, value in zip(letters, values, strict=True))
        )
        for name, values in differing[:MAX_OPTIONS]
    ]
    if len(differing) > MAX_OPTIONS:
        more = ", ".join(option.name for option in differing[MAX_OPTIONS:])
        notes.append(TableNote(f"other options that differ: {more}"))
    return notes


def _data_rows(
    runs: Sequence[FinishedRun], categories: Sequence[str], metrics: Sequence[str]
) -> TableRows:
    rows: list[list[object]] = []
    differing = differing_options(runs)
    settings = {
        run.label: [(option.name, option.values[n]) for option in differing]
        for n, run in enumerate(runs)
    }
    for category in [*categories, None]:
        for run in runs:
            if category is not None:
                values = [_value(run, metric, category) for metric in metrics]
                notes = [] if category in run.categories else ["failed"]
            else:
                means = [run.mean(metric, run.expected) for metric in metrics]
                values = [value for value, _ in means]
                notes = [
                    f"{metric} incomplete ({count} of {len(run.expected)})"
                    for metric, (value, count) in zip(metrics, means, strict=True)
                    if value is None and count
                ]
            uncertain = run.uncertain.get("mean" if category is None else category, ())
            wide = [
                metric
                for metric, value in zip(metrics, values, strict=True)
                if metric in uncertain and value is not None
            ]
            notes += [f"{WIDE_BOUNDS}: {', '.join(wide)}"] if wide else []
            name = "mean" if category is None else printable(category)
            origin = [printable(part) for part in (run.method, run.data, run.backbone)]
            note = "; ".join([*notes, *(tag.long for tag in run.tags)])
            options = "; ".join(f"{option} {value}" for option, value in settings[run.label])
            more = [options] if len(runs) > 1 else []
            rows.append([name, run.label, *origin, run.weights, *values, note, *more])
        if len(runs) == 2:
            values = [_difference(runs, metric, category) for metric in metrics]
            name = "mean" if category is None else printable(category)
            rows.append([name, DIFFERENCE, *[""] * 4, *values, "", ""])
    header = ["category", "run", "method", "data", "backbone", "weights", *metrics, "note"]
    return TableRows([*header, "options"] if len(runs) > 1 else header, rows)


def _in_order(names: set[str]) -> list[str]:
    ordered = [name for name in (*METRICS, *CLASS_METRICS) if name in names]
    return [*ordered, *sorted(names - set(ordered))]


# -- labels, also for published tables -------------------------------------------------------------


def label_runs(runs: Sequence[FinishedRun]) -> dict[str, FinishedRun]:
    """Return the runs by short labels: A to Z, then numbers."""
    names = [*ascii_uppercase, *(str(n) for n in range(len(ascii_uppercase) + 1, len(runs) + 1))]
    return dict(zip(names, runs, strict=False))


def _column_label(
    runs_by_letter: Mapping[str, FinishedRun],
    letter: str,
    differing: Sequence[OptionDifference] = (),
) -> str:
    """Return the letter of a run, what differs, and warnings; nothing for a single run.

    Args:
        runs_by_letter: All runs.
        letter: The letter of the run, or the heading of the difference of two runs.
        differing: Options that differ; several are not repeated in each column.
    """
    if len(runs_by_letter) == 1 or letter not in runs_by_letter:
        return letter if letter == DIFFERENCE else ""
    place = list(runs_by_letter).index(letter)
    labels = [option.values[place] for option in differing]
    if len(labels) > MAX_LABELS:
        labels = []
    tags = [tag.short for tag in runs_by_letter[letter].tags]
    return "\n".join([letter, *map(_shortened, labels), *tags])


def _shortened(text: str) -> str:
    """Return the end of a long value, which of a path is the name of the file."""
    return text if len(text) <= LONGEST_LABEL else f"...{text[3 - LONGEST_LABEL :]}"


def run_warnings(runs_by_letter: Mapping[str, FinishedRun]) -> list[TableNote]:
    """Return each distinct warning once, with the letters of the runs that it applies to."""
    letters_by_warning: dict[str, list[str]] = {}
    for letter, run in runs_by_letter.items():
        for tag in run.tags:
            letters_by_warning.setdefault(tag.long, []).append(letter)
    if len(runs_by_letter) == 1:
        return [TableNote(text, loud=True) for text in letters_by_warning]
    return [
        TableNote(f"{', '.join(letters)}: {text}", loud=True)
        for text, letters in letters_by_warning.items()
    ]


def _setting_notes(runs_by_letter: Mapping[str, FinishedRun]) -> list[TableNote]:
    """Return a note if only some of the runs are transductive."""
    others = [
        letter
        for letter, run in runs_by_letter.items()
        if transductive_remark(run.protocol) is None
    ]
    if len(others) in (0, len(runs_by_letter)):
        return []
    text = f"{', '.join(others)}: not transductive, so that the settings of the runs differ"
    return [TableNote(text, loud=True)]


def mark_notes(lines: Sequence[TableLine], num_names: int) -> list[TableNote]:
    """Return the explanation of the mark of metrics with wide bounds, if a line has the mark.

    Args:
        lines: Lines of a table.
        num_names: Number of leading columns that hold names.
    """
    columns = range(num_names, len(lines[0].cells))
    if not has_mark(lines, MARK, columns):
        return []
    return [TableNote(UNCERTAIN_WARNING, loud=True, mark=MARK)]


def run_legend(runs_by_letter: Mapping[str, FinishedRun]) -> list[TableNote]:
    """Return one note per run: its letter, folder, method, data and weights."""
    if len(runs_by_letter) == 1:
        return [TableNote(run.description) for run in runs_by_letter.values()]
    runs = list(runs_by_letter.values())
    return [
        TableNote(f"{letter}: {run.description}{_distinction(run, runs)}")
        for letter, run in runs_by_letter.items()
    ]


def _distinction(run: FinishedRun, runs: Sequence[FinishedRun]) -> str:
    """Return the settings in which a run differs from others of the same description."""
    alike = [r for r in runs if _name(r) == _name(run)]
    keys = dict.fromkeys(key for r in alike for key in r.protocol)
    texts = [
        f"{LABELS.get(key, printable(key).replace('_', ' '))}: "
        f"{value_text(run.protocol[key]) if key in run.protocol else 'not recorded'}"
        for key in keys
        if not any(isinstance(r.protocol.get(key), dict | list) for r in alike)
        and len({repr(r.protocol.get(key)) for r in alike}) > 1
    ]
    return "".join(f", {text}" for text in texts)


def _name(run: FinishedRun) -> str:
    """Return the description of a run without its folder."""
    return run.description.removeprefix(run.label)


def column_heading(metric: str, addition: str = "") -> str:
    """Return a metric's heading, followed by an optional addition on new lines."""
    name = heading(metric)
    return f"{name}\n{addition}" if addition else name
