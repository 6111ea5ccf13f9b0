"""Split conformal p-values and thresholds: decisions with a bounded rate of false alarms.

The scores of ``n`` normal images that were not fitted on are the calibration scores. A new image has the
p-value ``p = (1 + #{calibration scores >= score}) / (n + 1)``. If new normal images are exchangeable with
the calibration images, then calling images with ``p <= alpha`` anomalous has a false-alarm rate of at most
``alpha``, averaged over calibration sets (Vovk, Gammerman and Shafer 2005, "Algorithmic learning in a
random world"). For the calibration set at hand the rate is a random variable with the distribution
Beta(k, n + 1 - k), ``k = floor(alpha (n + 1))``; ties only lower it. Its 95 % quantile is the guaranteed
rate (Bates, Candes, Lei, Romano and Sesia 2023, "Testing for outliers with conformal p-values").
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from anomaly_clip.errors import check_between

__all__ = [
    "CONFIDENCE",
    "average_rate",
    "benjamini_hochberg",
    "binomial_interval",
    "guaranteed_rate",
    "normals_needed",
    "p_values",
    "rank_of",
    "smallest_alpha",
    "threshold_of",
]

CONFIDENCE = 0.95
"""Confidence of guaranteed rates and of intervals."""


def p_values(scores: ArrayLike, calibration: ArrayLike) -> NDArray[np.float64]:
    """Return the conformal p-value of each score.

    Args:
        scores: Scores ``(m,)`` of new images; higher = more anomalous.
        calibration: Scores ``(n,)`` of normal images, in any order.

    Returns:
        ``(m,)`` in ``[1 / (n + 1), 1]``.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> from anomaly_clip.decisions.conformal import p_values
        >>> p_values([0.5, 3.0], [0.0, 1.0, 2.0]).tolist()
        [0.75, 0.25]
    """
    ascending = np.sort(_numbers("calibration", calibration))
    new = _numbers("scores", scores)
    at_least = len(ascending) - np.searchsorted(ascending, new, side="left")
    return np.asarray((1 + at_least) / (len(ascending) + 1), dtype=np.float64)


def rank_of(alpha: float, num_scores: int, confidence: float | None = None) -> int:
    """Return ``k``: an image is anomalous if its score is above the k-th largest calibration score.

    Args:
        alpha: Largest false-alarm rate.
        num_scores: Number ``n`` of calibration scores.
        confidence: None: the rate holds on average over calibration sets. Otherwise the probability
            of calibration sets for which it holds.

    Returns:
        The largest such ``k``; 0 if there are too few scores for this rate.

    Example:
        >>> from anomaly_clip.decisions.conformal import rank_of
        >>> rank_of(0.05, 18), rank_of(0.05, 19), rank_of(0.05, 58, 0.95), rank_of(0.05, 59, 0.95)
        (0, 1, 0, 1)
    """
    check_between("alpha", alpha, 0, 1, open_low=True, open_high=True)
    # The decimal fraction that was typed: 0.29 * 100 is below 29 in binary.
    k = int(Fraction(str(alpha)) * (num_scores + 1))
    if confidence is None:
        return k
    check_between("confidence", confidence, 0, 1, open_low=True, open_high=True)
    low = 0  # the rate grows with k
    while low < k:
        middle = (low + k + 1) // 2
        if guaranteed_rate(middle, num_scores, confidence) <= alpha:
            low = middle
        else:
            k = middle - 1
    return low


def threshold_of(calibration: ArrayLike, k: int) -> float:
    """Return the k-th largest calibration score: higher scores have ``p <= k / (n + 1)``.

    Raises:
        ValueError: If ``k`` is not in 1..n.
    """
    ascending = np.sort(_numbers("calibration", calibration))
    if not 1 <= k <= len(ascending):
        raise ValueError(f"k is {k}, but there are {len(ascending)} calibration scores")
    return float(ascending[-k])


def average_rate(k: int, num_scores: int) -> float:
    """Return the false-alarm rate of a rank, averaged over calibration sets: ``k / (n + 1)``."""
    return k / (num_scores + 1)


def guaranteed_rate(k: int, num_scores: int, confidence: float = CONFIDENCE) -> float:
    """Return the rate that a calibration set's false-alarm rate exceeds with ``1 - confidence``.

    Example:
        >>> from anomaly_clip.decisions.conformal import guaranteed_rate
        >>> round(guaranteed_rate(5, 100), 3)
        0.089
    """
    if k < 1:
        return 0.0
    return float(beta.ppf(confidence, k, num_scores + 1 - k))


def normals_needed(alpha: float, confidence: float | None = None) -> int:
    """Return the smallest number of calibration images for a false-alarm rate.

    Example:
        >>> from anomaly_clip.decisions.conformal import normals_needed
        >>> [(normals_needed(a), normals_needed(a, 0.95)) for a in (0.05, 0.01, 0.001)]
        [(19, 59), (99, 299), (999, 2995)]
    """
    high = 1
    while not rank_of(alpha, high, confidence):
        high *= 2
    low = high // 2  # has rank 0
    while high - low > 1:
        middle = (low + high) // 2
        if rank_of(alpha, middle, confidence):
            high = middle
        else:
            low = middle
    return high


def smallest_alpha(num_scores: int, confidence: float | None = None) -> float:
    """Return the smallest false-alarm rate that a number of calibration images allows."""
    if confidence is None:
        return 1 / (num_scores + 1)
    return guaranteed_rate(1, num_scores, confidence)


def binomial_interval(
    count: int, total: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a probability, given ``count`` of ``total``.

    Example:
        >>> from anomaly_clip.decisions.conformal import binomial_interval
        >>> [round(limit, 3) for limit in binomial_interval(0, 10)]
        [0.0, 0.308]
    """
    if total < 1 or not 0 <= count <= total:
        raise ValueError(f"count is {count} of {total}, but must be in 0..total, and total >= 1")
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - tail, count + 1, total - count))
    return low, high


def benjamini_hochberg(
    values: Sequence[float] | NDArray[np.floating], rate: float
) -> NDArray[np.bool_]:
    """Return which of several p-values are rejected at a false discovery rate.

    Conformal p-values that share one calibration set are positively dependent in the sense that the
    procedure needs (Bates et al. 2023, Theorem 2).

    Args:
        values: p-values ``(m,)``.
        rate: Largest expected share of normal images among the images that are called anomalous.

    Returns:
        bool ``(m,)``.
    """
    check_between("fdr", rate, 0, 1, open_low=True, open_high=True)
    p = _numbers("p-values", values)
    ascending = np.sort(p)
    limits = rate * np.arange(1, len(p) + 1) / max(1, len(p))
    below = np.flatnonzero(ascending <= limits)
    if not len(below):
        return np.zeros(len(p), dtype=bool)
    return np.asarray(p <= ascending[below[-1]])


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if np.isnan(numbers).any():
        raise ValueError(f"{name}: a value is NaN")
    return numbers
