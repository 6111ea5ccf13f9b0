"""Metrics of a test on the report page: means, categories and kinds of defect, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.metrics.image import rank_sorted
from anomaly_clip.metrics.intervals import auroc_interval, mean_interval
from anomaly_clip.reporting.metrics_table import heading, marked_percent, percent
from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import ImageRow, RunFiles, mapping
from anomaly_clip.results.selection import best_threshold

__all__ = ["KindRow", "MetricRow", "MetricsView", "interval_text"]

SUMMARY = ("image_auroc", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_pro", "accuracy", "f1")
"""Metrics whose means are shown at the top."""
IMAGE_AUROC = "image_auroc"
BOOTSTRAP = "image_auroc_bootstrap"
"""Interval in ``metrics.json`` of a run with ``model.evaluator.bootstrap``."""
DEPENDENT = " Scores of a transductive method depend on each other, so that these are rough."

Interval = tuple[float, float]


class MetricRow(NamedTuple):
    """The metrics of a category."""

    name: str
    num_images: int | None
    num_anomalous: int | None
    cells: list[tuple[str, str]]
    """Each metric in percent, with its interval; the interval is empty if there is none."""


class KindRow(NamedTuple):
    """The images of one kind of defect, compared with the normal images of their category."""

    category: int
    """Index of the category on the page; -1 for the mean of several."""
    cells: list[str]


class MetricsView:
    """The metrics of a run, as the page shows them.

    Args:
        files: Files of the run.
        names: Categories in the order of the page.
    """

    def __init__(self, files: RunFiles, names: Sequence[str]) -> None:
        self._files = files
        self._names = names

    @cached_property
    def rows(self) -> list[MetricRow]:
        """The categories, in their order in the file."""
        images, anomalous = self._counts
        return [
            MetricRow(name, images.get(name), anomalous.get(name), self._cells(name, metrics))
            for name, metrics in self._files.metrics.items()
        ]

    @property
    def mean(self) -> list[tuple[str, str]] | None:
        """The means over the categories; None for predict."""
        mean = self._files.mean
        return None if mean is None else self._cells("mean", mean)

    @property
    def summary(self) -> list[tuple[str, str, str]]:
        """Heading, value and interval of the means at the top."""
        mean = self._files.mean or {}
        cells = dict(zip(mean, self.mean or (), strict=True))
        return [
            (heading(name).replace("\n", " "), *cells[name])
            for name in SUMMARY
            if mean.get(name) is not None
        ]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Interval of image AUROC by category; of several rounds, there are none."""
        if self._files.num_rounds > 1:
            return {}
        images, anomalous = self._counts
        intervals: dict[str, Interval] = {}
        for name, metrics in self._files.metrics.items():
            value, stored = metrics.get(IMAGE_AUROC), self._files.intervals.get(name, {})
            total, defective = images.get(name), anomalous.get(name)
            if value is None:
                continue
            if BOOTSTRAP in stored:
                intervals[name] = stored[BOOTSTRAP]
            elif isinstance(total, int) and isinstance(defective, int) and 0 < defective < total:
                intervals[name] = auroc_interval(value, total - defective, defective)
        return intervals

    @cached_property
    def mean_interval(self) -> Interval | None:
        """Interval of the mean image AUROC; None if a category has none."""
        values = {
            name: value
            for name, metrics in self._files.metrics.items()
            if (value := metrics.get(IMAGE_AUROC)) is not None
        }
        if not values or set(values) != set(self.intervals):
            return None
        return mean_interval(list(values.values()), [self.intervals[name] for name in values])

    @property
    def method(self) -> str:
        """Formula of the intervals; empty without any."""
        if not self.intervals:
            return ""
        resampled = any(BOOTSTRAP in self._files.intervals.get(n, {}) for n in self.intervals)
        return (
            "95 % intervals of image AUROC: "
            + (
                "bootstrap of the images"
                if resampled
                else "score method of Newcombe (2006), from the numbers of images"
            )
            + "; they hold for independent images of the same kind. Other metrics have no interval."
            + (DEPENDENT if mapping(self._files.run.get("protocol")).get("transductive") else "")
        )

    @cached_property
    def kinds(self) -> list[KindRow]:
        """Image AUROC and recall by kind of defect, if a category has several kinds."""
        by_category: dict[str, list[ImageRow]] = {}
        for row in self._files.rows:
            if not row.error and row.label is not None:
                by_category.setdefault(row.category, []).append(row)
        rows: list[KindRow] = []
        several: dict[str, list[tuple[float, Interval, int]]] = {}
        for name in self._names:
            for kind, value, interval, count, recall in _kinds(by_category.get(name, ())):
                several.setdefault(kind, []).append((value, interval, count))
                cells = [printable(name), printable(kind), f"{count:,}", percent([value])[0]]
                cells += [interval_text(interval), percent([recall])[0]]
                rows.append(KindRow(self._names.index(name), cells))
        means = []
        for kind, entries in several.items():
            if len(entries) > 1:
                values = [value for value, _, _ in entries]
                ends = mean_interval(values, [interval for _, interval, _ in entries])
                cells = [f"mean of {len(entries)} categories", printable(kind)]
                cells += [f"{sum(count for _, _, count in entries):,}"]
                cells += [percent([sum(values) / len(values)])[0], interval_text(ends), "–"]
                means.append(KindRow(-1, cells))
        width = 5 if self._files.decisions is not None else 6  # the decisions have the recall
        return [row._replace(cells=row.cells[:width]) for row in (*means, *rows)]

    @property
    def _counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        protocol = mapping(self._files.run.get("protocol"))
        return mapping(protocol.get("images")), mapping(protocol.get("anomalous"))

    def _cells(self, row: str, metrics: Mapping[str, float | None]) -> list[tuple[str, str]]:
        """Return the metrics of a category, or their means, in percent; wide bounds are marked."""
        names = list(self._files.mean or ())
        texts = marked_percent(metrics, names, self._files.uncertain.get(row, ()))
        interval = self.mean_interval if row == "mean" else self.intervals.get(row)
        shown = "" if interval is None else interval_text(interval)
        return [
            (text, shown if name == IMAGE_AUROC else "")
            for name, text in zip(names, texts, strict=True)
        ]


def interval_text(interval: Interval) -> str:
    """Return an interval of fractions in percent.

    Example:
        >>> from anomaly_clip.reporting.metrics_view import interval_text
        >>> interval_text((0.5, 1.0))
        '50.0 to 100.0'
    """
    return " to ".join(percent(interval))


def _kinds(rows: Sequence[ImageRow]) -> list[tuple[str, float, Interval, int, float]]:
    """Return name, image AUROC, its interval, number of images and recall of each kind."""
    normal = np.array([row.image_score for row in rows if not row.label])
    by_kind: dict[str, list[ImageRow]] = {}
    for row in rows:
        if row.label:
            by_kind.setdefault(row.kind, []).append(row)
    if len(by_kind) < 2 or not len(normal):
        return []
    labels = [bool(row.label) for row in rows]
    threshold = best_threshold([row.image_score for row in rows], labels)
    kinds = []
    for kind in sorted(by_kind):
        scores = np.array([row.image_score for row in by_kind[kind]])
        value = _auroc(normal, scores)
        recall = float(np.mean(scores >= threshold)) if threshold is not None else 0.0
        interval = auroc_interval(value, len(normal), len(scores))
        kinds.append((kind, value, interval, len(scores), recall))
    return kinds


def _auroc(normal: NDArray[np.float64], anomalous: NDArray[np.float64]) -> float:
    return rank_sorted(np.sort(np.concatenate([normal, anomalous])), np.sort(anomalous)).auroc()
