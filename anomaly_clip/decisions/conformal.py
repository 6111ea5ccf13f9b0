"""Split conformal p-values and thresholds: decisions with a bounded rate of false alarms.

The scores of ``n`` normal images that were not fitted on are the calibration scores. A new image
has the p-value ``p = (1 + #{calibration scores >= score}) / (n + 1)``. If new normal images are
exchangeable with the calibration images, then calling images with ``p <= alpha`` anomalous has a
false-alarm rate of at most ``alpha``, averaged over calibration sets (Vovk, Gammerman and Shafer
2005, "Algorithmic learning in a random world"). For the calibration set at hand the rate is a
random variable with the distribution Beta(k, n + 1 - k), ``k = floor(alpha (n + 1))``; ties only
lower it. Its 95 % quantile is the guaranteed rate (Bates, Candès, Lei, Romano and Sesia 2023,
"Testing for outliers with conformal p-values"). ``docs/decisions.md`` explains all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from anomaly_clip.errors import check_at_least, check_between

__all__ = [
    "CONFIDENCE",
    "average_rate",
    "benjamini_hochberg",
    "binomial_interval",
    "guaranteed_rate",
    "normals_needed",
    "p_values",
    "plain_rate",
    "rank_of",
    "smallest_alpha",
    "threshold_of",
]

CONFIDENCE = 0.95
"""Confidence of guaranteed rates and of intervals."""
ROUNDING = 4 * float(np.finfo(np.float64).eps)
"""Relative error of a product of three rounded numbers."""


def p_values(
    scores: ArrayLike, calibration: ArrayLike, counts: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Return the conformal p-value of each score.

    Args:
        scores: Scores ``(m,)`` of new images; higher = more anomalous, infinities included.
        calibration: Scores ``(n,)`` of normal images, in any order.
        counts: Number of calibration scores that each value stands for ``(n,)``; default: one.

    Returns:
        ``(m,)`` in ``[1 / (n + 1), 1]``, ``n`` being the sum of the counts.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> from anomaly_clip.decisions.conformal import p_values
        >>> p_values([0.5, 3.0], [0.0, 1.0, 2.0]).tolist()
        [0.75, 0.25]
    """
    ascending, at_least = _sorted(calibration, counts)
    first = np.searchsorted(ascending, _numbers("scores", scores), side="left")
    return np.asarray((1 + at_least[first]) / (at_least[0] + 1), dtype=np.float64)


def threshold_of(calibration: ArrayLike, k: int, counts: ArrayLike | None = None) -> float:
    """Return the k-th largest calibration score: higher scores have ``p <= k / (n + 1)``.

    Args:
        calibration: See `p_values`.
        k: Rank, 1 = the largest.
        counts: See `p_values`.

    Raises:
        ValueError: If ``k`` is not in 1..n, or a score is NaN.
    """
    ascending, at_least = _sorted(calibration, counts)
    if not 1 <= k <= at_least[0]:
        raise ValueError(f"k is {k}, but there are {at_least[0]} calibration scores")
    # The highest value with at least k scores at or above it.
    return float(ascending[np.flatnonzero(at_least >= k)[-1]])


def plain_rate(rate: float) -> float:
    """Return a rate as a Python float, with the decimals that were typed: float32's 0.29 is 0.29.

    Raises:
        ValueError: If it is not in (0, 1).
    """
    plain = float(str(rate)) if isinstance(rate, np.floating) else float(rate)
    check_between("alpha", plain, 0, 1, open_low=True, open_high=True)
    return plain


def rank_of(alpha: float, num_scores: int, confidence: float | None = None) -> int:
    """Return ``k``: an image is anomalous if its score is above the k-th largest calibration score.

    Args:
        alpha: Largest false-alarm rate, in (0, 1).
        num_scores: Number ``n`` of calibration scores.
        confidence: None: the rate holds on average over calibration sets. Otherwise the probability
            of calibration sets for which it holds, in (0, 1).

    Returns:
        The largest such ``k`` in 0..n; 0 if there are too few scores for this rate.

    Example:
        >>> from anomaly_clip.decisions.conformal import rank_of
        >>> rank_of(0.05, 18), rank_of(0.05, 19), rank_of(0.05, 58, 0.95), rank_of(0.05, 59, 0.95)
        (0, 1, 0, 1)
    """
    alpha = plain_rate(alpha)
    check_at_least("number of calibration scores", num_scores, 0)
    if confidence is None:
        # Both sides are the nearest floats of their fractions, so that 0.29 and 29 / 100 are equal.
        # The product 0.29 * 100 is below 29.
        k = min(int(alpha * (num_scores + 1)) + 1, num_scores)
        while k and average_rate(k, num_scores) > alpha:
            k -= 1
        return k
    low, high = 0, num_scores  # the rate grows with k
    while low < high:
        middle = (low + high + 1) // 2
        if guaranteed_rate(middle, num_scores, confidence) <= alpha:
            low = middle
        else:
            high = middle - 1
    return low


def average_rate(k: int, num_scores: int) -> float:
    """Return the false-alarm rate of a rank, averaged over calibration sets: ``k / (n + 1)``."""
    return k / (num_scores + 1)


def guaranteed_rate(k: int, num_scores: int, confidence: float = CONFIDENCE) -> float:
    """Return the rate that a calibration set's false-alarm rate exceeds with ``1 - confidence``.

    Args:
        k: Rank of the threshold, 0..n; without a threshold (0) there are no false alarms.
        num_scores: Number ``n`` of calibration scores.
        confidence: In (0, 1).

    Example:
        >>> from anomaly_clip.decisions.conformal import guaranteed_rate
        >>> round(guaranteed_rate(5, 100), 3)
        0.089
    """
    check_between("confidence", confidence, 0, 1, open_low=True, open_high=True)
    if not 0 <= k <= num_scores:
        raise ValueError(f"k is {k}, but there are {num_scores} calibration scores")
    if k == 0:
        return 0.0
    if k == 1:  # 1 - (1 - rate)^n = confidence
        return -math.expm1(math.log1p(-confidence) / num_scores)
    return float(beta.ppf(confidence, k, num_scores + 1 - k))


def smallest_alpha(num_scores: int, confidence: float | None = None) -> float:
    """Return the smallest false-alarm rate that a number of calibration images allows.

    Raises:
        ValueError: If there are none.
    """
    check_at_least("number of calibration scores", num_scores, 1)
    if confidence is None:
        return average_rate(1, num_scores)
    return guaranteed_rate(1, num_scores, confidence)


def normals_needed(alpha: float, confidence: float | None = None) -> int:
    """Return the smallest number of calibration images for a false-alarm rate.

    Args:
        alpha: See `rank_of`.
        confidence: See `rank_of`.

    Example:
        >>> from anomaly_clip.decisions.conformal import normals_needed
        >>> [(normals_needed(a), normals_needed(a, 0.95)) for a in (0.05, 0.01, 0.001)]
        [(19, 59), (99, 299), (999, 2995)]
    """
    alpha = plain_rate(alpha)
    high = 1
    while smallest_alpha(high, confidence) > alpha:
        high *= 2
    low = high // 2  # too few
    while high - low > 1:
        middle = (low + high) // 2
        if smallest_alpha(middle, confidence) <= alpha:
            high = middle
        else:
            low = middle
    return high


def binomial_interval(
    count: int, total: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a probability, given ``count`` of ``total``.

    Raises:
        ValueError: If ``count`` is not in 0..total, or ``total`` is 0.

    Example:
        >>> from anomaly_clip.decisions.conformal import binomial_interval
        >>> [round(limit, 3) for limit in binomial_interval(0, 10)]
        [0.0, 0.308]
    """
    check_between("confidence", confidence, 0, 1, open_low=True, open_high=True)
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
        values: p-values ``(m,)`` in ``[0, 1]``.
        rate: Largest expected share of normal images among the images that are called anomalous.

    Returns:
        bool ``(m,)``.

    Raises:
        ValueError: If a value is outside ``[0, 1]`` or NaN.
    """
    check_between("fdr", rate, 0, 1, open_low=True, open_high=True)
    p = _numbers("p-values", values)
    if len(p) and not 0 <= p.min() <= p.max() <= 1:
        raise ValueError(f"p-values must be in [0, 1], got {p.min()} to {p.max()}")
    ascending = np.sort(p)
    limits = float(rate) * np.arange(1, len(p) + 1) / max(1, len(p))
    below = np.flatnonzero(ascending <= limits * (1 + ROUNDING))
    if not len(below):
        return np.zeros(len(p), dtype=bool)
    return np.asarray(p <= ascending[below[-1]])


def _sorted(
    calibration: ArrayLike, counts: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return ascending scores ``(n,)``, and how many scores are at least each ``(n + 1,)``."""
    values = _numbers("calibration", calibration)
    order = np.argsort(values, kind="stable")
    each = np.ones(len(values), np.int64) if counts is None else np.asarray(counts, np.int64)
    at_least = np.zeros(len(values) + 1, np.int64)
    at_least[:-1] = np.cumsum(each[order][::-1])[::-1]
    return values[order], at_least


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if np.isnan(numbers).any():
        raise ValueError(f"{name}: a value is NaN")
    return numbers
