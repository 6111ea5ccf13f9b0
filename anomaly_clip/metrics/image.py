"""Exact threshold-free metrics of scores: AUROC, average precision, F1-max.

These metrics depend only on the number of normal items above each anomalous score. One sort of all
scores and a binary search for each anomalous score therefore suffice. The same ranking is used for
image scores, pixels and PRO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Ranking",
    "as_array",
    "auroc",
    "average_precision",
    "bootstrap_auroc",
    "check_scores",
    "f1_max",
    "is_finite",
    "rank_sorted",
]


class Ranking(NamedTuple):
    """Counts at every distinct anomalous score, from the highest down, ``(T,)`` each."""

    tied: NDArray[np.int64]
    """Anomalous items with this score."""
    above: NDArray[np.int64]
    """Normal items above this score."""
    at_least: NDArray[np.int64]
    """Normal items at or above this score."""
    num_normal: int

    @property
    def true_positives(self) -> NDArray[np.int64]:
        """Anomalous items at or above each score."""
        return self.tied.cumsum()

    @property
    def num_anomalous(self) -> int:
        """Number of anomalous items."""
        return int(self.tied.sum())

    @property
    def defined(self) -> bool:
        """True if both classes occur."""
        return len(self.tied) > 0 and self.num_normal > 0

    def auroc(self) -> float:
        """See :func:`auroc`."""
        if not self.defined:
            return math.nan
        total = 2 * self.num_anomalous * self.num_normal  # doubled, because ties count half
        above = self.above + self.at_least
        # Integers are exact if the total fits; otherwise, doubles keep 15 digits.
        tied = self.tied if total < 2**63 else self.tied.astype(np.float64)
        return (total - (tied @ above).item()) / total

    def average_precision(self) -> float:
        """See :func:`average_precision`."""
        if not self.defined:
            return math.nan
        true_positives = self.true_positives
        precision = true_positives / (true_positives + self.at_least)
        return float(self.tied.astype(np.float64) @ precision) / self.num_anomalous

    def f1_max(self) -> float:
        """See :func:`f1_max`."""
        if not self.defined:
            return math.nan
        true_positives = self.true_positives
        retrieved = true_positives + self.at_least
        retrieved += self.num_anomalous
        return float(2 * (true_positives / retrieved).max())


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
    return _ranked(scores, target).auroc()


def average_precision(scores: Tensor, target: Tensor) -> float:
    """Mean precision over the recall steps, without interpolation. NaN unless both classes occur.

    Arguments and errors as in :func:`auroc`.
    """
    return _ranked(scores, target).average_precision()


def f1_max(scores: Tensor, target: Tensor) -> float:
    """Highest F1 over all thresholds. NaN unless both classes occur.

    Arguments and errors as in :func:`auroc`.
    """
    return _ranked(scores, target).f1_max()


def bootstrap_auroc(
    scores: Tensor, target: Tensor, num_resamples: int, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return a percentile bootstrap interval of AUROC, from images resampled with replacement.

    Normal and anomalous images are resampled separately, because a test set fixes their numbers.

    Args:
        scores: Floating ``(n,)``.
        target: bool ``(n,)``.
        num_resamples: Number of resamples.
        seed: Seed of the resampling.
        level: Fraction of the resamples inside the interval.

    Returns:
        Lower and upper end; NaN unless both classes occur.
    """
    scores, target = check_scores(scores, target)
    normal, anomalous = as_array(scores[~target]), as_array(scores[target])
    if not len(normal) or not len(anomalous):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    areas = np.empty(num_resamples)
    for number in range(num_resamples):
        normals = np.sort(rng.choice(normal, len(normal)))
        hits = rng.choice(anomalous, len(anomalous))
        below = np.searchsorted(normals, hits, "left") + np.searchsorted(normals, hits, "right")
        areas[number] = below.mean() / (2 * len(normal))
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rank(scores: Tensor, target: Tensor) -> Ranking:
    """Rank flat, finite scores."""
    if scores.device.type == "cpu":
        # numpy sorts values only, with vector instructions; torch also sorts their indices.
        return rank_sorted(np.sort(as_array(scores)), np.sort(as_array(scores[target])))
    return _rank_on_device(scores, target)


def _rank_on_device(scores: Tensor, target: Tensor) -> Ranking:
    values, tied = scores[target].unique(return_counts=True)
    in_order = scores.sort().values
    below = torch.searchsorted(in_order, values)
    not_above = torch.searchsorted(in_order, values, right=True)
    counts, low, high = (array.cpu().numpy() for array in (tied, below, not_above))
    return _ranking(counts, low, high, len(scores))


def rank_sorted(scores: NDArray[np.floating], anomalous: NDArray[np.floating]) -> Ranking:
    """Rank anomalous scores among all scores; both arrays are in ascending order."""
    last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))[: len(anomalous)]
    values, tied = anomalous[last], np.diff(last, prepend=-1)
    below, not_above = (np.searchsorted(scores, values, side) for side in ("left", "right"))
    return _ranking(tied, below, not_above, len(scores))


def as_array(scores: Tensor) -> NDArray[np.floating]:
    """Return scores as a numpy array; half precision, which numpy sorts slowly, becomes float32."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    array: NDArray[np.floating] = wide.detach().cpu().numpy()
    return array


def _ranking(
    tied: NDArray[np.int64],
    below: NDArray[np.int64],
    not_above: NDArray[np.int64],
    num_scores: int,
) -> Ranking:
    """Subtract the anomalous items from the counts of all items to get those of normal items.

    Selecting and copying the normal scores instead would cost as much as sorting them.
    """
    true_positives = tied.cumsum()
    num_anomalous = int(tied.sum())
    missed = num_anomalous - true_positives  # anomalous items below each score
    at_least: NDArray[np.int64] = num_scores - below - missed - tied
    above: NDArray[np.int64] = num_scores - not_above - missed
    return Ranking(tied[::-1], above[::-1], at_least[::-1], num_scores - num_anomalous)


def check_scores(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check that scores and targets match, and flatten them.

    Raises:
        ValueError: If shapes or types do not fit, or a score is not finite.
    """
    scores, target = torch.as_tensor(scores), torch.as_tensor(target)
    if scores.shape != target.shape:
        raise ValueError(
            f"metrics: scores {tuple(scores.shape)} and target {tuple(target.shape)} differ in "
            "shape: pass one target per score"
        )
    if not scores.is_floating_point() or target.dtype != torch.bool:
        raise ValueError(
            f"metrics: expected floating scores and a bool target, got {scores.dtype} and "
            f"{target.dtype}"
        )
    if not is_finite(scores):
        flat = scores.flatten()
        place = int((~flat.isfinite()).nonzero()[0])
        raise ValueError(
            f"metrics: score {place} of {len(flat)} is NaN or infinite ({float(flat[place])}) and "
            "cannot be ranked: remove it, or compute it in single precision"
        )
    return scores.flatten(), target.flatten()


def is_finite(values: Tensor) -> bool:
    """Return True if no value is NaN or infinite; one fast pass finds and tests the extremes."""
    if not values.numel():
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())


def _ranked(scores: Tensor, target: Tensor) -> Ranking:
    scores, target = check_scores(scores, target)
    return rank(scores, target)
