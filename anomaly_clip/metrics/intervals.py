"""Confidence intervals of AUROC by a formula: no resampling, and no randomness.

R. G. Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney
statistic. Part 2: Asymptotic methods and evaluation", Statistics in Medicine 25 (2006), method 5.
Unlike the intervals of Hanley and McNeil and of DeLong, it stays wide at an AUROC of 1, which is
what few images often give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["auroc_interval", "mean_interval"]

STEPS = 60  # of the bisection: below the precision of doubles


def auroc_interval(
    auroc: float, num_normal: int, num_anomalous: int, level: float = 0.95
) -> tuple[float, float]:
    """Return the confidence interval of an AUROC.

    The images are taken as independent draws of both classes. Photographs of the same object, or
    frames of a film, are not independent, and the interval is then too narrow.

    Args:
        auroc: In ``[0, 1]``.
        num_normal: Number of normal images, at least 1.
        num_anomalous: Number of anomalous images, at least 1.
        level: Confidence.

    Returns:
        Lower and upper end in ``[0, 1]``.

    Example:
        >>> from anomaly_clip.metrics.intervals import auroc_interval
        >>> [round(end, 3) for end in auroc_interval(1.0, 1, 5)]
        [0.36, 1.0]
        >>> [round(end, 3) for end in auroc_interval(0.9, 50, 50)]
        [0.816, 0.946]
    """
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    pairs = num_normal * num_anomalous
    others = (num_normal + num_anomalous) / 2 - 1

    def contains(value: float) -> bool:
        """Return whether an AUROC of this value would not be rejected."""
        spread = 1 + others * (1 - value) / (2 - value) + others * value / (1 + value)
        variance = value * (1 - value) * spread / pairs
        return abs(auroc - value) <= quantile * math.sqrt(variance)

    def end(outside: float) -> float:
        inside = auroc
        if contains(outside):
            return outside
        for _ in range(STEPS):
            middle = (inside + outside) / 2
            if contains(middle):
                inside = middle
            else:
                outside = middle
        return inside

    return end(0.0), end(1.0)


def mean_interval(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Return the interval of the mean of independent values from their intervals (MOVER).

    The method of variance estimates recovery: Zou and Donner, Statistics in Medicine 27 (2008).

    Args:
        values: One or more values, such as the AUROC of each category.
        intervals: Interval of each.

    Example:
        >>> from anomaly_clip.metrics.intervals import mean_interval
        >>> low, high = mean_interval([0.9, 0.7], [(0.8, 0.95), (0.6, 0.8)])
        >>> round(low, 4), round(high, 4)
        (0.7293, 0.8559)
    """
    count = len(values)
    mean = sum(values) / count
    pairs = list(zip(values, intervals, strict=True))
    below = math.sqrt(sum((value - low) ** 2 for value, (low, _) in pairs)) / count
    above = math.sqrt(sum((high - value) ** 2 for value, (_, high) in pairs)) / count
    return max(0.0, mean - below), min(1.0, mean + above)
