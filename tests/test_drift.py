"""Online p-values and the power martingale, against plain transcriptions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from anomaly_clip.decisions import drift
from anomaly_clip.decisions.conformal import p_values
from anomaly_clip.decisions.drift import (
    ALARM,
    EPSILON,
    DriftMonitor,
    martingale_log10,
    online_p_values,
)

SCORES = st.lists(st.integers(-2, 2).map(float), max_size=12)


def plain_p_values(scores: Sequence[float], calibration: Sequence[float], seed: int) -> list[float]:
    """The definition, word for word, with the documented random numbers."""
    draws = np.random.Generator(np.random.PCG64(seed))
    seen, p = list(calibration), []
    for score in scores:
        above = sum(other > score for other in seen)
        equal = sum(other == score for other in seen) + 1  # the image itself included
        p.append((above + (1 - draws.random()) * equal) / (len(seen) + 1))
        seen.append(score)
    return p


@given(SCORES, SCORES, st.integers(0, 3))
def test_p_values_follow_the_definition(
    scores: list[float], calibration: list[float], seed: int
) -> None:
    expected = plain_p_values(scores, calibration, seed)
    assert online_p_values(scores, calibration, seed) == pytest.approx(expected, rel=1e-15)
    monitor = DriftMonitor(calibration, seed=seed)
    assert [monitor.update(score) for score in scores] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("block", [1, 2, 7, 1024])
@pytest.mark.parametrize("levels", [5, 10**6])
def test_blocks_of_any_size_give_the_same_ranks(
    block: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "BLOCK", block)
    rng = np.random.default_rng(0)
    scores, calibration = rng.integers(0, levels, 150), rng.integers(0, levels, 40)
    ordered = np.concatenate([np.sort(scores), [-math.inf, math.inf, math.inf, -math.inf]])
    for stream in (scores.astype(float), ordered, ordered[::-1]):
        expected = plain_p_values(stream.tolist(), calibration.tolist(), 3)
        assert online_p_values(stream, calibration, 3) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("epsilon", [None, EPSILON, 0.3])
@pytest.mark.parametrize("shift", [0, 5])
def test_the_monitor_equals_the_functions(epsilon: float | None, shift: int) -> None:
    rng = np.random.default_rng(1)
    scores, calibration = rng.normal(size=300), rng.normal(size=30)
    scores[150:] += shift
    path = martingale_log10(online_p_values(scores, calibration, 7), epsilon)
    monitor = DriftMonitor(calibration, epsilon, 7)
    for index, score in enumerate(scores):
        monitor.update(score)
        assert monitor.log10 == pytest.approx(path[index], abs=1e-9)
        assert monitor.largest_log10 == pytest.approx(max(0, path[: index + 1].max()), abs=1e-9)
        passed = np.flatnonzero(path[: index + 1] >= 2)
        assert monitor.at == (passed[0] if len(passed) else None)
        assert monitor.alarm == (monitor.at is not None) == (monitor.largest >= ALARM)
    assert monitor.count == 300
    assert monitor.alarm == (shift > 0)


def test_an_alarm_stays() -> None:
    monitor = DriftMonitor(np.zeros(9), epsilon=0.5)
    for score in [*range(1, 40), *([-1.0] * 200)]:
        monitor.update(score)
    assert monitor.log10 < 0
    assert monitor.alarm
    assert monitor.at is not None
    assert monitor.at < 39
    assert monitor.largest >= ALARM


def test_one_bet_by_hand() -> None:
    bets = [0.5 * 0.01**-0.5, 0.5 * 0.01**-0.5 * 0.5]
    assert 10 ** martingale_log10([0.01, 1.0], 0.5) == pytest.approx(bets)


@pytest.mark.parametrize("p", [[0.01], [1.0] * 3, [0.2, 0.4, 0.01, 0.9, 0.001], [0.5] * 12])
def test_the_mixture_is_the_mean_over_all_exponents(p: list[float]) -> None:
    def product(epsilon: float) -> float:
        return math.prod(epsilon * value ** (epsilon - 1) for value in p)

    expected, _ = integrate.quad(product, 0, 1)
    assert 10 ** martingale_log10(p)[-1] == pytest.approx(expected, rel=1e-6)


def test_several_streams_and_long_streams_do_not_overflow() -> None:
    p = np.array([np.full(100_000, 1e-12), np.full(100_000, 0.99), np.ones(100_000)])
    for epsilon in (None, EPSILON):
        paths = martingale_log10(p, epsilon)
        assert paths.shape == p.shape
        assert np.isfinite(paths).all()
        assert paths[0, -1] > 50_000
        assert paths[1] == pytest.approx(martingale_log10(p[1], epsilon))
    monitor = DriftMonitor([0.0])
    for score in range(1, 2000):
        monitor.update(float(score))
    assert 1e200 < monitor.largest <= 1e300


def test_without_images_there_is_no_drift() -> None:
    assert online_p_values([], [1.0]).shape == martingale_log10([]).shape == (0,)
    monitor = DriftMonitor([])
    assert (monitor.largest, monitor.alarm, monitor.at, monitor.count) == (1.0, False, None, 0)
    assert 0 < monitor.update(1.0) <= 1


def test_nan_is_refused_and_changes_nothing() -> None:
    monitor, other = DriftMonitor([0.0, 1.0]), DriftMonitor([0.0, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        monitor.update(float("nan"))
    assert monitor.update(0.5) == other.update(0.5)
    with pytest.raises(ValueError, match="NaN"):
        DriftMonitor([0.0, float("nan")])
    with pytest.raises(ValueError, match="NaN"):
        online_p_values([float("nan")], [1.0])
    for p in ([0.0], [1.1], [float("nan")]):
        with pytest.raises(ValueError, match="online p-values must be in"):
            martingale_log10(p)


@pytest.mark.parametrize(("epsilon", "seed"), [(0.0, 0), (1.0, 0), (None, -1)])
def test_settings_are_checked(epsilon: float | None, seed: int) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be in|seed must be 0 or more"):
        DriftMonitor([1.0], epsilon, seed)


@pytest.mark.parametrize("num_levels", [None, 3])
def test_p_values_of_exchangeable_scores_are_uniform_and_independent(
    num_levels: int | None,
) -> None:
    rng = np.random.default_rng(2)
    streams = rng.normal(size=(3000, 6))
    if num_levels:
        streams = np.round(streams)
    p = np.array(
        [online_p_values(row[3:], row[:3], seed) for seed, row in enumerate(streams)]
    )  # (3000, 3)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(p.T) - np.eye(3)).max() < 0.08


def streams_with_alarm(calibration: np.ndarray, scores: np.ndarray, online: bool) -> float:
    """Return the share of streams whose martingale reaches 100."""
    pairs = enumerate(zip(calibration, scores, strict=True))
    paths = [
        martingale_log10(online_p_values(new, fixed, seed) if online else p_values(new, fixed))
        for seed, (fixed, new) in pairs
    ]
    return float((np.max(paths, axis=1) >= 2).mean())


@pytest.mark.slow
def test_false_alarms_of_drift_are_rare_with_online_p_values_only() -> None:
    rng = np.random.default_rng(3)
    num, n, length = 400, 60, 400
    calibration, scores = rng.normal(size=(num, n)), rng.normal(size=(num, length))
    limit = 0.01 + 3 * math.sqrt(0.01 * 0.99 / num)
    assert streams_with_alarm(calibration, scores, online=True) <= limit
    assert streams_with_alarm(calibration, scores, online=False) > limit
    assert streams_with_alarm(calibration, scores + 2, online=True) > 0.95
