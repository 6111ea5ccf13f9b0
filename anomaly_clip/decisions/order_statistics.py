"""Few order statistics in place of many calibration scores, so that decisions stay valid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["MAX_SCORES", "order_statistics"]

MAX_SCORES = 10_000
"""Largest number of values that a calibration stores per category."""


def order_statistics(
    scores: Sequence[float], ranks: Iterable[int], most: int = MAX_SCORES
) -> tuple[tuple[float, ...], tuple[int, ...] | None]:
    """Return values and counts that stand for scores.

    Equal scores are counted, which loses nothing. If there are still too many values, the scores
    are divided into groups of neighbours, and each group is replaced by its largest score. No
    p-value becomes smaller by this, because no score becomes smaller. The upper half of
    the groups has one score each, so that small p-values stay exact; the other groups are of equal
    size. A group begins at each of the given ranks, so that the thresholds of these ranks, and the
    decisions by them, stay exact.

    Args:
        scores: Calibration scores ``(n,)``, ascending.
        ranks: Ranks of thresholds, 1 = the largest.
        most: Largest number of values, plus one per rank beyond half of it.

    Returns:
        Values, ascending, and the number of scores that each stands for; None if all scores are
        returned as they are.

    Example:
        >>> from anomaly_clip.decisions.order_statistics import order_statistics
        >>> order_statistics([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [2], most=4)
        ((1.0, 3.0, 4.0, 5.0), (2, 2, 1, 1))
    """
    num_scores = len(scores)
    if num_scores <= most:
        return tuple(scores), None
    values, counts = np.unique(scores, return_counts=True)
    if len(values) <= most:
        return tuple(values.tolist()), tuple(counts.tolist())
    descending = np.asarray(scores, dtype=np.float64)[::-1]
    single = most // 2
    forced = {rank - 1 for rank in ranks if rank > single}
    num_rest = max(1, most - single - len(forced))
    rest = np.linspace(single, num_scores, num_rest, endpoint=False).astype(int)
    starts = np.array(sorted({*range(single), *forced, *rest.tolist()}))
    counts = np.diff([*starts, num_scores])
    values = descending[starts]
    return tuple(values[::-1].tolist()), tuple(counts[::-1].tolist())
