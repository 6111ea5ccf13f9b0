"""ROC, precision-recall and PRO curves, thinned to the points that a plot needs.

An item is positive if it scores at or above the threshold. ROC and precision-recall curves are
computed from the numbers of normal and anomalous items that become positive at each threshold, from
the highest threshold down. PRO curves use fractions of regions in place of anomalous items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.metric_values import Curve, Curves
from anomaly_clip.metrics.image import Ranking

__all__ = [
    "image_curves",
    "pixel_curves",
    "sampled_counts",
]

NUM_POINTS = 128
"""Points sampled along a curve; the end of the curve may add one."""
SAMPLED = 4096
"""Number of scores of anomalous pixels sampled if every pixel may have a different score."""


def image_curves(scores: NDArray[np.floating], anomalous: NDArray[np.bool_]) -> Curves:
    """Return ROC and precision-recall curves of images.

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
    """Return ROC, precision-recall and PRO curves of pixels; both classes must occur.

    Args:
        anomalous: Number of anomalous pixels that become positive at each threshold, from the
            highest threshold down.
        normal: Number of normal pixels that become positive at each threshold.
        regions: Fraction of each region that becomes positive at each threshold, summed over the
            regions.
        fpr_limit: False positive rate up to which PRO is plotted.
    """
    return {
        "pixel_roc": receiver_operating(anomalous, normal),
        "pixel_pr": precision_recall(anomalous, normal),
        "pixel_pro": region_overlap(regions, normal, fpr_limit),
    }


def receiver_operating(anomalous: NDArray[Any], normal: NDArray[Any]) -> Curve:
    """Return the true positive rate over the false positive rate."""
    return _thinned(_shares(normal), _shares(anomalous))


def precision_recall(anomalous: NDArray[Any], normal: NDArray[Any]) -> Curve:
    """Return precision over recall, starting at the first true positive."""
    true_positives = anomalous.cumsum()
    recalled = true_positives > 0
    precision = true_positives[recalled] / (true_positives + normal.cumsum())[recalled]
    recall = true_positives[recalled] / true_positives[-1]
    # Precision is undefined at recall 0; the precision of the first true positive is used there.
    return _thinned(np.append(0.0, recall), np.append(precision[0], precision))


def region_overlap(regions: NDArray[np.float64], normal: NDArray[Any], fpr_limit: float) -> Curve:
    """Return the mean overlap of the regions over the false positive rate, up to a limit."""
    rate, overlap = _shares(normal), _shares(regions)
    last = int(np.searchsorted(rate, fpr_limit, side="right"))
    if last < len(rate):  # the limit lies inside a step
        at_limit = np.interp(fpr_limit, rate[last - 1 : last + 1], overlap[last - 1 : last + 1])
        rate, overlap = np.append(rate[:last], fpr_limit), np.append(overlap[:last], at_limit)
    return _thinned(rate, overlap)


def sampled_counts(
    ranking: Ranking, shares: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Count the pixels that become positive at each of some thousands of thresholds.

    Of each sampled score of anomalous pixels, one threshold lies just above the score, and one is
    the score. Between them and the next scores, curves are straight.

    Args:
        ranking: Ranking of the pixels.
        shares: Fractions of the regions that have each score of the ranking.

    Returns:
        Counts of anomalous pixels, counts of normal pixels, and fractions of regions: the arguments
        of :func:`pixel_curves`.
    """
    places = _places(len(ranking.tied), SAMPLED)
    true_positives, overlap = ranking.true_positives, shares.cumsum()
    tied = ranking.tied[places]

    def both(before: NDArray[Any], after: NDArray[Any], last: float) -> NDArray[Any]:
        return np.diff(np.append(np.stack([before, after], axis=1), last), prepend=0)

    return (
        both(true_positives[places] - tied, true_positives[places], true_positives[-1]),
        both(ranking.above[places], ranking.at_least[places], ranking.num_normal),
        both(overlap[places] - shares[places], overlap[places], overlap[-1]),
    )


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cumulative fraction at each threshold, starting at 0."""
    total = counts.cumsum(dtype=np.float64)
    return np.append(0.0, total / total[-1])


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """Keep both ends of a curve and points at about equal distances along the curve."""
    length = np.append(0.0, (np.abs(np.diff(x)) + np.abs(np.diff(y))).cumsum())
    targets = np.linspace(0, length[-1], NUM_POINTS)
    places = np.unique(np.append(np.searchsorted(length, targets - 1e-12), len(x) - 1))
    return Curve(*(values[places].round(5).tolist() for values in (x, y)))


def _places(length: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
