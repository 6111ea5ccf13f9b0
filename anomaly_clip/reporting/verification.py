"""Comparison of a run with its repetition: every metric, and what else has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anomaly_clip.reporting.comparison import ComparisonTable, TableRows, column_heading, label_runs
from anomaly_clip.reporting.table import ReportTable, TableLine, TableNote
from anomaly_clip.results.finished_run import FinishedRun, printable
from anomaly_clip.results.folder import METRICS_FILE
from anomaly_clip.results.run_files import mapping

__all__ = ["Repetition", "verification_report"]

HEADER = ["run", "category", "metric", "recorded", "repeated", "difference", "equal"]
"""Columns of the machine-readable table."""
MEAN = "mean over the categories"
"""Row of the means, a name that is no category's."""
UNDEFINED = "–"


class Repetition(NamedTuple):
    """A run and the result of repeating it."""

    run: FinishedRun
    again: FinishedRun


class Compared(NamedTuple):
    """A metric of a run and of its repetition; None: undefined, or absent."""

    category: str
    metric: str
    recorded: float | None
    repeated: float | None
    equal: bool

    @property
    def difference(self) -> float | None:
        """Repeated minus recorded value; None if one of them is undefined."""
        if not isinstance(self.recorded, int | float) or self.repeated is None:
            return None
        return self.repeated - self.recorded


def verification_report(
    repetitions: Sequence[Repetition], tolerance: float
) -> tuple[ComparisonTable, bool]:
    """Return a table of the means and of the metrics that differ, and whether any differs.

    Args:
        repetitions: Runs and their repetitions.
        tolerance: Largest difference that counts as equal, as a fraction.
    """
    letters = label_runs([repetition.run for repetition in repetitions])
    several = len(repetitions) > 1
    lines: list[TableLine] = []
    rows: list[list[object]] = []
    notes: list[TableNote] = []
    differs = False
    for letter, (run, again) in zip(letters, repetitions, strict=True):
        compared = _compare(run, again, tolerance)
        differing = [pair for pair in compared if not pair.equal]
        start = f"{letter}: " if several else ""
        differs = differs or bool(differing)
        notes.append(TableNote(start + _verdict(run, compared, tolerance), loud=bool(differing)))
        notes += [TableNote(start + text) for text in _changes(run, again)]
        shown = [pair for pair in compared if pair.category == MEAN or not pair.equal]
        lines += [
            TableLine((letter if several else "", *_cells(pair)), "item", first=number == 0)
            for number, pair in enumerate(shown)
        ]
        rows += [
            [run.label, *pair[:4], pair.difference, "yes" if pair.equal else "no"]
            for pair in compared
        ]
    table = ReportTable(
        title=f"Repeated runs, compared with {METRICS_FILE}",
        notes=notes,
        headings=["run" if several else "", "category", "metric", "recorded", "repeated", "+/-"],
        lines=lines,
        legend=[],
        num_names=3,
    )
    return ComparisonTable(table, TableRows(HEADER, rows)), differs


def _compare(run: FinishedRun, again: FinishedRun, tolerance: float) -> list[Compared]:
    """Compare all metrics that a run has recorded, and all categories of its repetition."""
    compared = []
    for category in [*dict.fromkeys([*run.categories, *again.categories]), MEAN]:
        if category == MEAN:
            recorded, repeated = run.means, again.means
        else:
            recorded, repeated = (mapping(r.categories.get(category)) for r in (run, again))
        # A later version may have metrics that the run could not record.
        for metric in recorded or repeated:
            values = recorded.get(metric), repeated.get(metric)
            present = metric in recorded and metric in repeated
            equal = present and _is_equal(*values, tolerance)
            compared.append(Compared(category, metric, *values, equal))
    return compared


def _is_equal(recorded: object, repeated: object, tolerance: float) -> bool:
    if isinstance(recorded, int | float) and isinstance(repeated, int | float):
        return abs(recorded - repeated) <= tolerance
    return recorded is None and repeated is None


def _verdict(run: FinishedRun, compared: Sequence[Compared], tolerance: float) -> str:
    differing = sum(not pair.equal for pair in compared)
    largest = max((abs(d) for pair in compared if (d := pair.difference) is not None), default=0.0)
    bound = f"largest difference {largest:.3g}, allowed {tolerance:g}"
    if differing:
        return f"{run.label}: {differing} of {len(compared)} metrics DIFFER ({bound})"
    return f"{run.label}: all {len(compared)} metrics are equal ({bound})"


def _cells(pair: Compared) -> tuple[str, ...]:
    values = (pair.recorded, pair.repeated)
    texts = (f"{v:.9f}" if isinstance(v, int | float) else UNDEFINED for v in values)
    difference = UNDEFINED if pair.difference is None else f"{pair.difference:+.3g}"
    metric = column_heading(pair.metric).replace("\n", " ")
    return printable(pair.category), metric, *texts, difference


def _changes(run: FinishedRun, again: FinishedRun) -> list[str]:
    """Return what may explain differences: images, settings, software and device."""
    texts = []
    if run.seed is None:
        texts.append("the run has no seed, so that random choices differ")
    for key, name in (("images", "test images"), ("anomalous", "anomalous test images")):
        then, now = (mapping(r.protocol.get(key)) for r in (run, again))
        texts += _changed(then, now, f" ({name})")
    settings = {k: v for k, v in run.protocol.items() if not isinstance(v, dict | list)}
    environment = dict(mapping(run.record.get("environment")))
    environment.pop("checkpoint_sha256", None)  # a repeated fit writes another file
    for then, now in (
        (settings, again.protocol),
        (mapping(run.record.get("versions")), mapping(again.record.get("versions"))),
        (environment, mapping(again.record.get("environment"))),
    ):
        texts += _changed(then, now)
    return texts


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], remark: str = "") -> list[str]:
    return [
        f"{printable(key)}{remark}: {printable(value)} then, "
        f"{printable(now.get(key, 'not recorded'))} now"
        for key, value in then.items()
        if now.get(key) != value
    ]
