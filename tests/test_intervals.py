"""Confidence intervals of AUROC by a formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from anomaly_clip.metrics.intervals import auroc_interval, mean_interval


def literal(theta: float, m: int, n: int, z: float) -> list[float]:
    """Return the limits by Newcombe's equation, solved by another library."""
    m_star = n_star = (m + n) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) / (m * n) * (1 + n_star * (1 - t) / (2 - t) + m_star * t / (1 + t))
        return float((theta - t) ** 2 - z**2 * variance)

    low = brentq(excess, 0, theta - 1e-9) if theta > 0 else 0.0
    high = brentq(excess, theta + 1e-9, 1) if theta < 1 else 1.0
    return [low, high]


@pytest.mark.parametrize("counts", [(1, 5), (5, 1), (3, 10), (50, 50), (20, 400)])
@pytest.mark.parametrize("auroc", [0.0, 0.2, 0.5, 0.91, 1.0])
def test_the_ends_solve_the_equation(auroc: float, counts: tuple[int, int]) -> None:
    z = float(norm.ppf(0.975))
    interval = auroc_interval(auroc, *counts)
    assert interval == pytest.approx(literal(auroc, *counts, z), abs=1e-6)
    assert 0 <= interval[0] <= auroc <= interval[1] <= 1
    mirrored = auroc_interval(1 - auroc, *counts)
    assert mirrored == pytest.approx((1 - interval[1], 1 - interval[0]))
    assert auroc_interval(auroc, *counts, level=0.5)[0] >= interval[0]


def test_few_images_leave_much_open_even_at_the_best_value() -> None:
    low, high = auroc_interval(1.0, 1, 5)
    assert (round(low, 2), high) == (0.36, 1.0)
    assert auroc_interval(1.0, 100, 100)[0] > 0.95


@pytest.mark.parametrize(("counts", "auroc"), [((1, 5), 0.9), ((5, 5), 0.95), ((10, 30), 0.98)])
def test_the_intervals_contain_the_true_value(counts: tuple[int, int], auroc: float) -> None:
    rng = np.random.default_rng(0)
    shift = math.sqrt(2) * norm.ppf(auroc)  # of normal distributions
    hits = 0
    for _ in range(400):
        normal, anomalous = rng.normal(size=counts[0]), rng.normal(shift, size=counts[1])
        value = float((anomalous[:, None] > normal).mean())
        low, high = auroc_interval(value, *counts)
        hits += low <= auroc <= high
    assert hits / 400 > 0.92  # three standard errors below 0.95


def test_the_mean_of_categories() -> None:
    single = auroc_interval(0.8, 10, 12)
    assert mean_interval([0.8], [single]) == pytest.approx(single)
    low, high = mean_interval([0.8] * 4, [single] * 4)
    assert 0.8 - low == pytest.approx((0.8 - single[0]) / 2)  # as that of a standard error
    assert high - 0.8 == pytest.approx((single[1] - 0.8) / 2)
