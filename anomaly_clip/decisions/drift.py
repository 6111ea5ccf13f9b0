"""Drift: new images no longer look like the calibration images.

Each new score is ranked among the calibration scores and all scores seen since, ties broken at
random, and then joins them. If all of these images are exchangeable, the resulting online p-values
are independent and uniform (Vovk, Nouretdinov and Gammerman 2003, "Testing exchangeability
on-line"). A power martingale bets on small p-values: it starts at 1 and is multiplied by
``epsilon p^(epsilon - 1)`` for each image. Without a change it reaches 100 with a probability of at
most 1 %, however long it runs (Ville 1939, "Étude critique de la notion de collectif").

The p-values of decisions are no substitute: given one calibration set they are not uniform, and a
martingale of them gives many false alarms (``benchmarks/conformal.py``).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomaly_clip.errors import check_at_least, check_between

__all__ = ["ALARM", "EPSILON", "DriftMonitor", "martingale_log10", "online_p_values"]

ALARM = 100.0
"""Value of the martingale that is an alarm; its inverse bounds the probability of a false one."""
EPSILON = 0.92
"""Exponent of the power martingale of Vovk et al. 2003."""
NUM_NODES = 32
"""Gauss-Legendre nodes of the mixture over epsilon."""
MAX_LOG10 = 300.0
"""The martingale itself is returned up to ten to this power."""
BLOCK = 1024
"""Scores of a new block of sorted scores."""


class DriftMonitor:
    """Online p-values and a power martingale, one score at a time.

    An alarm stays: `alarm`, `at` and `largest` describe the whole stream. High scores raise it,
    whether they come from drift or from many defects; scores that become lower do not.
    Calls from several threads need a lock.

    Args:
        calibration: Calibration scores ``(n,)``, in any order.
        epsilon: Exponent in (0, 1), such as `EPSILON`. None: the mean of the martingales of all
            exponents, which finds a change sooner and loses less while there is none.
        seed: Seed of the random numbers that break ties, one per image in order.

    Raises:
        ValueError: If a score is NaN, or an argument is out of range.

    Example:
        >>> from anomaly_clip.decisions.drift import DriftMonitor
        >>> monitor = DriftMonitor([0.0, 1.0, 2.0])
        >>> 0 < monitor.update(5.0) <= 0.25
        True
        >>> monitor.count, monitor.alarm
        (1, False)
    """

    def __init__(self, calibration: ArrayLike, epsilon: float | None = None, seed: int = 0) -> None:
        self._seen = _SortedScores(calibration)
        self._random = _generator(seed)
        self._bets = _bets(epsilon)
        self._sum = 0.0  # of -log p
        self.count = 0
        """Number of images so far."""
        self.log10 = 0.0
        """Decimal logarithm of the martingale."""
        self.largest_log10 = 0.0
        """Decimal logarithm of its largest value so far."""
        self.at: int | None = None
        """Index of the image, from 0, that raised the alarm; None without one."""

    def update(self, score: float) -> float:
        """Take the score of the next image, and return its online p-value in (0, 1].

        Raises:
            ValueError: If the score is NaN; the state is then unchanged.
        """
        above, equal = self._seen.insert(float(score))
        draw = 1.0 - self._random.random()
        p = (above + draw * (equal + 1)) / self._seen.count
        self._sum -= math.log(p)
        self.count += 1
        self.log10 = float(_log10(np.array([self.count]), np.array([self._sum]), *self._bets)[0])
        self.largest_log10 = max(self.largest_log10, self.log10)
        if self.at is None and self.alarm:
            self.at = self.count - 1
        return p

    @property
    def largest(self) -> float:
        """Largest value of the martingale so far, 1 or more, and at most 1e300."""
        return float(10 ** min(self.largest_log10, MAX_LOG10))

    @property
    def alarm(self) -> bool:
        """True if the martingale has reached 100."""
        return self.largest_log10 >= math.log10(ALARM)


def online_p_values(
    scores: ArrayLike, calibration: ArrayLike, seed: int = 0
) -> NDArray[np.float64]:
    """Return the online, smoothed p-values of a stream; equal to those of a `DriftMonitor`.

    Args:
        scores: ``(m,)``, in order; higher = more anomalous.
        calibration: Calibration scores ``(n,)``.
        seed: See `DriftMonitor`.

    Returns:
        ``(m,)`` in (0, 1]: ``(#{seen > score} + draw (#{seen = score} + 1)) / (#{seen} + 1)``, with
        a draw from the uniform distribution on (0, 1].
    """
    seen = _SortedScores(calibration)
    stream = np.asarray(scores, dtype=np.float64).reshape(-1)
    ranks = np.array([seen.insert(score) for score in stream.tolist()]).reshape(-1, 2)
    draws = 1.0 - _generator(seed).random(len(stream))
    num_seen = seen.count - len(stream) + np.arange(1, len(stream) + 1)
    return np.asarray((ranks[:, 0] + draws * (ranks[:, 1] + 1)) / num_seen)


def martingale_log10(p_values: ArrayLike, epsilon: float | None = None) -> NDArray[np.float64]:
    """Return decimal logarithms of the martingale after each image.

    Args:
        p_values: Online p-values ``(..., m)`` in (0, 1], of one or several streams.
        epsilon: See `DriftMonitor`.

    Returns:
        ``(..., m)``.

    Raises:
        ValueError: If a p-value is outside (0, 1].

    Example:
        >>> from anomaly_clip.decisions.drift import martingale_log10
        >>> martingale_log10([0.01, 1.0], epsilon=0.5).round(2).tolist()
        [0.7, 0.4]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p > 0) & (p <= 1)).all():
        raise ValueError(f"online p-values must be in (0, 1], got {p.min()} to {p.max()}")
    counts = np.arange(1, p.shape[-1] + 1)
    return _log10(counts, np.cumsum(-np.log(p), axis=-1), *_bets(epsilon))


def _log10(
    counts: NDArray[np.integer],
    sums: NDArray[np.float64],
    exponents: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return logarithms ``(..., m)`` of weighted products of bets, given sums of ``-log p``."""
    total = np.full(sums.shape, -np.inf)
    for exponent, weight in zip(exponents.tolist(), weights.tolist(), strict=True):
        logs = math.log(weight) + counts * math.log(exponent) + (1 - exponent) * sums
        np.logaddexp(total, logs, out=total)
    return total / math.log(10)


def _bets(epsilon: float | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return exponents and their weights, which add up to 1."""
    if epsilon is None:  # a mean of martingales is a martingale
        nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES)
        return (nodes + 1) / 2, weights / 2
    check_between("epsilon", epsilon, 0, 1, open_low=True, open_high=True)
    return np.array([float(epsilon)]), np.ones(1)


def _generator(seed: int) -> np.random.Generator:
    """Return the generator whose i-th number breaks the ties of image i."""
    check_at_least("seed", seed, 0)
    return np.random.Generator(np.random.PCG64(seed))


class _SortedScores:
    """Scores in sorted blocks, so that an insertion moves few of them."""

    def __init__(self, scores: ArrayLike) -> None:
        ascending = np.sort(np.asarray(scores, dtype=np.float64).reshape(-1)).tolist()
        if ascending and math.isnan(ascending[-1]):  # NaN is sorted last
            raise ValueError("calibration: a value is NaN")
        self.count = len(ascending)
        starts = range(0, len(ascending), BLOCK)
        self._blocks = [array("d", ascending[start : start + BLOCK]) for start in starts]
        self._blocks = self._blocks or [array("d")]
        self._last = [block[-1] if block else -math.inf for block in self._blocks]

    def insert(self, score: float) -> tuple[int, int]:
        """Insert a score, and return how many others are above it, and how many are equal."""
        if math.isnan(score):
            raise ValueError("score: it is NaN")
        below = self._position(bisect_left(self._last, score), score, bisect_left)
        at_most = self._position(bisect_right(self._last, score), score, bisect_right)
        counts = self.count - at_most, at_most - below
        index = min(bisect_left(self._last, score), len(self._blocks) - 1)
        block = self._blocks[index]
        insort(block, score)
        self._last[index] = block[-1]
        self.count += 1
        if len(block) > 2 * BLOCK:
            self._blocks[index : index + 1] = block[:BLOCK], block[BLOCK:]
            self._last[index : index + 1] = block[BLOCK - 1], block[-1]
        return counts

    def _position(self, index: int, score: float, bisect: Callable[..., int]) -> int:
        """Return the number of scores before a position in a block."""
        inside = 0 if index == len(self._blocks) else bisect(self._blocks[index], score)
        return sum(map(len, self._blocks[:index])) + inside
