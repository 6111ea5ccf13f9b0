"""The curves behind the figures, thinned to what a picture needs.

A threshold takes in what scores at or above it. All curves are functions of how many normal and
anomalous items (and, for PRO, which part of the regions) come in at each threshold, from the
highest down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CURVES",
    "CURVES_FILE",
    "Curve",
    "Curves",
    "image_curves",
    "pixel_curves",
    "sampled_counts",
]

CURVES_FILE = "curves.json"
"""The file of a run that holds them."""
CURVES = ("image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro")
"""Names of the curves, in their order."""

NUM_POINTS = 128
"""Points of a curve, at most."""
SAMPLED = 4096
"""Thresholds that stand for all where every pixel has a score of its own."""


class Curve(NamedTuple):
    """Points of a curve, fractions in their order along it; all lie on the exact curve."""

    x: list[float]
    y: list[float]


Curves = Mapping[str, Curve]
"""By the names of `CURVES`; those that are not defined (one class only) are missing."""


def image_curves(scores: NDArray[np.floating], anomalous: NDArray[np.bool_]) -> Curves:
    """Return ROC and precision-recall of images.

    Args:
        scores: ``(n,)``; higher = more anomalous.
        anomalous: ``(n,)``.
    """
    distinct, place = np.unique(-scores, return_inverse=True)
    anomalous_counts = np.bincount(place[anomalous], minlength=len(distinct))
    normal_counts = np.bincount(place[~anomalous], minlength=len(distinct))
    if not anomalous_counts.any() or not normal_counts.any():
        return {}
    return {
        "image_roc": receiver_operating(anomalous_counts, normal_counts),
        "image_pr": precision_recall(anomalous_counts, normal_counts),
    }


def pixel_curves(
    anomalous: NDArray[Any],
    normal: NDArray[Any],
    regions: NDArray[np.float64],
    fpr_limit: float,
) -> Curves:
    """Return ROC, precision-recall and PRO of pixels; both classes must occur.

    Args:
        anomalous: How many come in at each threshold, from the highest down.
        normal: Likewise.
        regions: The part of regions that comes in, summed over them.
        fpr_limit: False positive rate up to which PRO is shown.
    """
    return {
        "pixel_roc": receiver_operating(anomalous, normal),
        "pixel_pr": precision_recall(anomalous, normal),
        "pixel_pro": region_overlap(regions, normal, fpr_limit),
    }


def receiver_operating(anomalous: NDArray[Any], normal: NDArray[Any]) -> Curve:
    """Return the share of anomalous items found over that of false alarms."""
    return _thinned(_shares(normal), _shares(anomalous))


def precision_recall(anomalous: NDArray[Any], normal: NDArray[Any]) -> Curve:
    """Return the precision over the recall, from the first anomalous item found."""
    true_positives = anomalous.cumsum()
    recalled = true_positives > 0
    precision = true_positives[recalled] / (true_positives + normal.cumsum())[recalled]
    recall = true_positives[recalled] / true_positives[-1]
    # A recall of 0 has no precision of its own; it takes that of the first item found.
    return _thinned(np.append(0.0, recall), np.append(precision[0], precision))


def region_overlap(regions: NDArray[np.float64], normal: NDArray[Any], fpr_limit: float) -> Curve:
    """Return the mean share of a region that is found, over false alarms up to a limit."""
    rate, overlap = _shares(normal), _shares(regions)
    last = int(np.searchsorted(rate, fpr_limit, side="right"))
    if last < len(rate):  # the limit lies inside of a step
        at_limit = np.interp(fpr_limit, rate[last - 1 : last + 1], overlap[last - 1 : last + 1])
        rate, overlap = np.append(rate[:last], fpr_limit), np.append(overlap[:last], at_limit)
    return _thinned(rate, overlap)


def sampled_counts(
    scores: NDArray[np.floating], defect: NDArray[np.floating], weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return what comes in at some thousands of thresholds, where every pixel's score is known.

    Args:
        scores: Of all pixels, in ascending order.
        defect: Of anomalous pixels, in ascending order.
        weights: One over the size of the region of each of these.

    Returns:
        Anomalous and normal pixels and parts of regions, as :func:`pixel_curves` takes them.
    """
    drawn = [values[_places(len(values), SAMPLED)] for values in (scores, defect)]
    thresholds = np.unique(np.concatenate(drawn))
    below, missed = (np.searchsorted(values, thresholds) for values in (scores, defect))
    covered = np.concatenate([[0.0], weights.cumsum()])
    true_positives = len(defect) - missed[::-1]
    false_positives = len(scores) - below[::-1] - true_positives
    overlap = covered[-1] - covered[missed[::-1]]
    return (
        np.diff(true_positives, prepend=0),
        np.diff(false_positives, prepend=0),
        np.diff(overlap, prepend=0.0),
    )


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return what is in at each threshold as a share of all, from none on."""
    total = counts.cumsum(dtype=np.float64)
    return np.append(0.0, total / total[-1])


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """Keep points that lie about equally far apart along the curve, and both ends."""
    length = np.append(0.0, (np.abs(np.diff(x)) + np.abs(np.diff(y))).cumsum())
    targets = np.linspace(0, length[-1], NUM_POINTS)
    places = np.unique(np.append(np.searchsorted(length, targets - 1e-12), len(x) - 1))
    return Curve(*(values[places].round(5).tolist() for values in (x, y)))


def _places(length: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
