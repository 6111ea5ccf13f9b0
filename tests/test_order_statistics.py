"""Few order statistics in place of many scores: p-values never smaller, exact thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly_clip.decisions.conformal import p_values, threshold_of
from anomaly_clip.decisions.order_statistics import MAX_SCORES, order_statistics


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.integers(2, 20),
    st.lists(st.integers(1, 60), max_size=6),
)
def test_p_values_are_conservative_and_thresholds_exact(
    integers: list[int], most: int, ranks: list[int]
) -> None:
    scores = sorted(map(float, integers))
    ranks = [rank for rank in ranks if rank <= len(scores)]
    values, counts = order_statistics(scores, ranks, most)
    assert list(values) == sorted(values)
    assert len(values) <= max(most, most // 2 + 1 + len(set(ranks)))
    assert sum(counts or [1] * len(values)) == len(scores)
    new = np.arange(-0.5, 13, 0.5)
    exact, stored = p_values(new, scores), p_values(new, values, counts)
    assert (stored >= exact).all()
    for k in ranks:
        threshold = threshold_of(scores, k)
        assert threshold_of(values, k, counts) == threshold
        rate = k / (len(scores) + 1)
        assert ((new > threshold) == (stored <= rate)).all()
    for k in range(1, len(scores) + 1):  # at ranks that were not named, decisions are conservative
        assert threshold_of(values, k, counts) >= threshold_of(scores, k)


@pytest.mark.parametrize("n", [MAX_SCORES, MAX_SCORES + 1, 123_457])
def test_small_p_values_of_many_scores_stay_exact(n: int) -> None:
    scores = np.sort(np.random.default_rng(0).normal(size=n))
    k = n // 3
    values, counts = order_statistics(tuple(scores), [k])
    assert len(values) <= MAX_SCORES
    assert (counts is None) == (n == MAX_SCORES)
    exact, stored = p_values(scores, scores), p_values(scores, values, counts)
    small = exact <= MAX_SCORES / 2 / (n + 1)
    assert (stored[small] == exact[small]).all()
    assert 0 <= (stored - exact).max() <= 2.1 / MAX_SCORES
    assert threshold_of(values, k, counts) == scores[-k]
