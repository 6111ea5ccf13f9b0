"""Metrics of an evaluation as plain values: names, means, bounds and curves.

Reports read and compare them without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

__all__ = [
    "CERTAIN",
    "CLASS_METRICS",
    "CURVES",
    "CURVES_FILE",
    "METRICS",
    "PIXEL_METRICS",
    "Bounds",
    "Curve",
    "Curves",
    "MetricValues",
    "Results",
    "mean_defined",
    "uncertain_metrics",
    "with_means",
]

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_pro")
METRICS = ("image_auroc", "image_ap", "image_f1_max", *PIXEL_METRICS)
"""Names under which metrics are logged, saved and printed, in this order."""

CLASS_METRICS = ("accuracy", "precision", "recall", "f1")
"""Names under which metrics are logged, saved and printed, in this order."""

CERTAIN = 1e-3
"""A reported pixel metric that may differ from the exact one by more than this is marked."""

MetricValues = dict[str, float | None]
"""Metric values by name, fractions in 0..1; None if undefined because all labels are equal."""

Bounds = dict[str, tuple[float, float]]
"""Lowest and highest possible value of each metric, by name."""

CURVES_FILE = "curves.json"
"""Name of the file of a run that contains the curves."""
CURVES = ("image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro")
"""Names of the curves, in this order."""


class Results(TypedDict):
    """Metrics of one evaluation."""

    mean: MetricValues
    """Unweighted mean over the categories in which a metric is defined."""
    categories: dict[str, MetricValues]
    intervals: dict[str, Bounds]
    """Intervals by category, and under the key ``mean`` those of the mean. The interval of a pixel
    metric from a histogram is guaranteed to contain the exact value. If requested, each category
    also has a bootstrap interval, ``image_auroc_bootstrap``."""


class Curve(NamedTuple):
    """Points of a curve as fractions, in order; all of them lie on the exact curve."""

    x: list[float]
    y: list[float]


Curves = Mapping[str, Curve]
"""Curves by their names in `CURVES`; undefined curves (a single class) are left out."""


def uncertain_metrics(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the metrics whose bounds are further from the value than `CERTAIN`.

    Args:
        results: `Results`, or the content of ``metrics.json``.

    Returns:
        Names of metrics by category, and under the key ``mean`` those of the mean; without the
        categories that have none.

    Example:
        >>> from anomaly_clip.metric_values import uncertain_metrics, with_means
        >>> bounds = {"cable": {"pixel_ap": (0.39, 0.41)}}
        >>> uncertain_metrics(with_means({"cable": {"pixel_auroc": 0.9, "pixel_ap": 0.4}}, bounds))
        {'cable': ['pixel_ap'], 'mean': ['pixel_ap']}
    """
    uncertain = {}
    for name, values in (*results["categories"].items(), ("mean", results["mean"])):
        bounds = results.get("intervals", {}).get(name, {})
        metrics = [
            metric
            for metric in PIXEL_METRICS
            if metric in bounds
            and (value := values.get(metric)) is not None
            and max(value - bounds[metric][0], bounds[metric][1] - value) > CERTAIN
        ]
        if metrics:
            uncertain[name] = metrics
    return uncertain


def with_means(categories: dict[str, MetricValues], intervals: dict[str, Bounds]) -> Results:
    """Return the metrics of categories with their means and the bounds of the means.

    Args:
        categories: Metrics by category.
        intervals: Bounds by category, where there are any.
    """
    intervals = dict(intervals)
    if any(name in bounds for bounds in intervals.values() for name in PIXEL_METRICS):
        intervals["mean"] = _mean_bounds(categories, intervals)
    rows = list(categories.values())
    mean = {name: mean_defined(row[name] for row in rows) for name in rows[0]}
    return Results(mean=mean, categories=categories, intervals=intervals)


def mean_defined(values: Iterable[float | None]) -> float | None:
    """Return the mean of the defined values, or None if there are none.

    Example:
        >>> from anomaly_clip.metric_values import mean_defined
        >>> mean_defined([0.5, None, 1.0]), mean_defined([None])
        (0.75, None)
    """
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None


def _mean_bounds(categories: dict[str, MetricValues], intervals: dict[str, Bounds]) -> Bounds:
    """Return the bounds of the means of pixel metrics."""
    bounds: Bounds = {}
    for name in PIXEL_METRICS:
        ends = [
            intervals.get(category, {}).get(name, (value, value))
            for category, metrics in categories.items()
            if (value := metrics.get(name)) is not None
        ]
        if ends:
            low, high = (fmean(column) for column in zip(*ends, strict=True))
            bounds[name] = (low, high)
    return bounds
