"""Distributions of W&B sweep files compared with SciPy, and their samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from anomaly_clip.commands.sweep_parameter import read_parameter

LAWS: list[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = [
    ({"min": -1.0, "max": 3}, stats.uniform(-1, 4).ppf),
    ({"min": 2, "max": 5}, stats.randint(2, 6).ppf),
    ({"distribution": "uniform", "min": 2, "max": 5}, stats.uniform(2, 3).ppf),
    ({"distribution": "log_uniform", "min": -2, "max": 1}, lambda u: np.exp(3 * u - 2)),
    (
        {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1},
        stats.loguniform(1e-5, 0.1).ppf,
    ),
    (
        {"distribution": "inv_log_uniform_values", "min": 1e-5, "max": 0.1},
        lambda u: 1 / stats.loguniform(10, 1e5).ppf(1 - u),
    ),
    (
        {"distribution": "inv_log_uniform", "min": -2, "max": 1},
        lambda u: 1 / np.exp(stats.uniform(-2, 3).ppf(1 - u)),
    ),
    ({"distribution": "normal", "mu": 2, "sigma": 3}, stats.norm(2, 3).ppf),
    ({"distribution": "normal"}, stats.norm(0, 1).ppf),
    ({"distribution": "log_normal", "mu": 1, "sigma": 0.5}, stats.lognorm(0.5, scale=np.e).ppf),
    (
        {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25},
        lambda u: np.round(u / 0.25) * 0.25,
    ),
    (
        {"distribution": "q_log_uniform_values", "min": 1, "max": 1000, "q": 10},
        lambda u: np.round(stats.loguniform(1, 1000).ppf(u) / 10) * 10,
    ),
    ({"distribution": "q_log_uniform", "min": 0, "max": 4}, lambda u: np.round(np.exp(4 * u))),
    (
        {"distribution": "q_normal", "mu": 10, "sigma": 4, "q": 2},
        lambda u: np.round(stats.norm(10, 4).ppf(u) / 2) * 2,
    ),
    (
        {"distribution": "q_log_normal", "mu": 1, "sigma": 1, "q": 0.5},
        lambda u: np.round(stats.lognorm(1, scale=np.e).ppf(u) / 0.5) * 0.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), LAWS)
def test_quantiles_are_those_of_scipy(
    given: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    parameter = read_parameter("x", given)
    levels = np.linspace(0.0103, 0.9911, 57)  # none at a jump of a discrete distribution
    values = [parameter.quantile(level) for level in levels.tolist()]
    np.testing.assert_allclose(values, expected(levels), rtol=1e-9, atol=1e-12)
    quantised = given.get("distribution", "").startswith("q_")
    whole = given == {"min": 2, "max": 5} or (quantised and isinstance(given.get("q", 1), int))
    assert {type(value) for value in values} == {int if whole else float}


def test_samples_are_uniform_and_independent() -> None:
    before = repr(np.random.get_state())
    parameter = read_parameter("model.lr", {"min": 0.0, "max": 1.0})
    samples = [parameter.draw(0, run, "model.lr") for run in range(1, 2001)]
    assert stats.kstest(samples, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.1
    others = [
        [parameter.draw(seed, run, name) for run in range(1, 2001)]
        for seed, name in ((1, "model.lr"), (0, "model.tau"))
    ]
    assert np.abs(np.corrcoef([samples, *others]) - np.eye(3)).max() < 0.1
    assert samples[6] == parameter.draw(0, 7, "model.lr")
    assert repr(np.random.get_state()) == before


def test_values_follow_their_probabilities() -> None:
    given = {"values": ["a", "b", "c"], "probabilities": [0.2, 0.0, 0.8]}
    parameter = read_parameter("x", given)
    assert [parameter.quantile(level) for level in (0.1, 0.19, 0.21, 0.999)] == ["a", "a", "c", "c"]
    samples = [read_parameter("x", {"values": [True, 2]}).draw(0, run, "x") for run in range(1000)]
    assert 400 < samples.count(2) < 600
    assert read_parameter("x", {"value": [3, 6]}).draw(0, 1, "x") == [3, 6]


@pytest.mark.parametrize("bounds", [(1e-5, 0.1), (3, 7), (0.3, 0.3)])
def test_samples_stay_within_their_bounds(bounds: tuple[float, float]) -> None:
    low, high = bounds
    given = {"distribution": "log_uniform_values", "min": low, "max": high}
    parameter = read_parameter("x", given)
    assert parameter.quantile(2**-53) >= low
    assert parameter.quantile(1 - 2**-53) <= high
