"""Exact threshold-free figures of one list of scores: AUROC, average precision, F1-max.

All three are functions of two running counts: how many anomalous and how many normal items score at
least a threshold, for every threshold that occurs. One sort gives the counts. The functions serve
image scores and, where a sort of all pixels is affordable, pixels too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "auroc",
    "auroc_from_counts",
    "average_precision",
    "average_precision_from_counts",
    "f1_max",
    "f1_max_from_counts",
    "threshold_counts",
]


def auroc(scores: Tensor, target: Tensor) -> float:
    """Area under the ROC curve; ties count half. NaN unless both classes occur.

    Args:
        scores: Floating, any shape; higher = more anomalous.
        target: bool, of the same shape; True = anomalous.

    Raises:
        ValueError: If shapes or types do not fit, or a score is not finite.

    Example:
        >>> import torch
        >>> from anomaly_clip.metrics import auroc
        >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True]))
        0.75
    """
    return auroc_from_counts(*threshold_counts(scores, target))


def average_precision(scores: Tensor, target: Tensor) -> float:
    """Mean precision over the recall steps, without interpolation. NaN unless both classes occur.

    Arguments and errors as in :func:`auroc`.
    """
    return average_precision_from_counts(*threshold_counts(scores, target))


def f1_max(scores: Tensor, target: Tensor) -> float:
    """Highest F1 over all thresholds. NaN unless both classes occur.

    Arguments and errors as in :func:`auroc`.
    """
    return f1_max_from_counts(*threshold_counts(scores, target))


def threshold_counts(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Count true and false positives at every distinct threshold, from the highest score down.

    Returns:
        Two int64 vectors that only grow and end in the numbers of anomalous and of normal items.
    """
    scores, target = check_scores(scores, target)
    scores, order = scores.sort(descending=True)
    positives = target[order].cumsum(dim=0)
    last_of_tie = torch.ones_like(target)
    last_of_tie[:-1] = scores[1:] != scores[:-1]
    ranks = last_of_tie.nonzero().squeeze(1)
    true_positives = positives[ranks]
    return true_positives, ranks + 1 - true_positives


def auroc_from_counts(true_positives: Tensor, false_positives: Tensor) -> float:
    """See :func:`auroc`; the counts are those of :func:`threshold_counts`."""
    if not _both_classes(true_positives, false_positives):
        return math.nan
    # Twice the area, in whole numbers: exact as long as 2 P N stays below 9.2e18.
    tp, fp = true_positives, false_positives
    below = torch.cat([tp.new_zeros(1), tp[:-1]])
    steps = fp.diff(prepend=fp.new_zeros(1))
    doubled = ((tp + below) * steps).sum()
    return int(doubled) / (2 * int(tp[-1]) * int(fp[-1]))


def average_precision_from_counts(true_positives: Tensor, false_positives: Tensor) -> float:
    """See :func:`average_precision`; the counts are those of :func:`threshold_counts`."""
    if not _both_classes(true_positives, false_positives):
        return math.nan
    tp, fp = true_positives.double(), false_positives.double()
    steps = tp.diff(prepend=tp.new_zeros(1))
    return float((steps * tp / (tp + fp)).sum() / tp[-1])


def f1_max_from_counts(true_positives: Tensor, false_positives: Tensor) -> float:
    """See :func:`f1_max`; the counts are those of :func:`threshold_counts`."""
    if not _both_classes(true_positives, false_positives):
        return math.nan
    tp, fp = true_positives.double(), false_positives.double()
    return float((2 * tp / (tp + fp + tp[-1])).max())


def check_scores(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten scores and targets after checking that they fit each other.

    Raises:
        ValueError: If shapes or types do not fit, or a score is not finite.
    """
    scores, target = torch.as_tensor(scores), torch.as_tensor(target)
    if scores.shape != target.shape:
        raise ValueError(
            f"metrics: scores {tuple(scores.shape)} and target {tuple(target.shape)} differ in "
            "shape"
        )
    if not scores.is_floating_point() or target.dtype != torch.bool:
        raise ValueError(
            f"metrics: expected floating scores and a bool target, got {scores.dtype} and "
            f"{target.dtype}"
        )
    if not scores.isfinite().all():
        raise ValueError("metrics: a score is NaN or infinite, so that nothing can be ranked")
    return scores.flatten(), target.flatten()


def _both_classes(true_positives: Tensor, false_positives: Tensor) -> bool:
    occur = len(true_positives) and true_positives[-1] > 0 and false_positives[-1] > 0
    return bool(occur)
