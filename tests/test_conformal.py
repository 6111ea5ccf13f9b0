"""Conformal p-values, ranks, rates and intervals, against transcriptions and other libraries."""

from __future__ import annotations

import time
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anomaly_clip.decisions.conformal import (
    average_rate,
    benjamini_hochberg,
    binomial_interval,
    guaranteed_rate,
    normals_needed,
    p_values,
    plain_rate,
    rank_of,
    smallest_alpha,
    threshold_of,
)

ALPHAS = (0.05, 0.01, 0.001, 0.29, 0.5, 0.07, 0.99)
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)  # with ties
INF = float("inf")


def literal_p(score: float, calibration: list[float]) -> float:
    """The definition, word for word."""
    return (1 + sum(normal >= score for normal in calibration)) / (len(calibration) + 1)


@given(SCORES, SCORES)
def test_p_values_follow_the_definition(scores: list[float], calibration: list[float]) -> None:
    expected = [literal_p(score, calibration) for score in scores]
    assert p_values(scores, calibration).tolist() == expected


@given(SCORES, st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_counts_stand_for_repeated_scores(calibration: list[float], counts: list[int]) -> None:
    used = counts[: len(calibration)]
    repeated = np.repeat(calibration, used)
    scores = np.arange(-4, 5)
    assert p_values(scores, calibration, used).tolist() == p_values(scores, repeated).tolist()
    for k in range(1, len(repeated) + 1):
        assert threshold_of(calibration, k, used) == sorted(repeated)[-k]


@pytest.mark.parametrize(
    ("score", "expected"),
    [(INF, 0.25), (-INF, 1.0), (1.0, 0.75), (np.nextafter(1.0, 2), 0.5), (0.0, 1.0)],
)
def test_p_values_of_extreme_and_tied_scores(score: float, expected: float) -> None:
    assert p_values(score, [2.0, 0.0, 1.0]).tolist() == [expected]


def test_p_values_without_scores() -> None:
    assert p_values([], [1.0]).shape == (0,)
    assert p_values([3.0, -INF], []).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("scores", "calibration"), [([np.nan], [1.0]), ([1.0], [1.0, np.nan])])
def test_nan_has_no_p_value(scores: list[float], calibration: list[float]) -> None:
    with pytest.raises(ValueError, match="NaN"):
        p_values(scores, calibration)


def test_a_million_p_values_take_less_than_seconds() -> None:
    rng = np.random.default_rng(0)
    start = time.process_time()
    p = p_values(rng.normal(size=1_000_000), rng.normal(size=10_000))
    assert time.process_time() - start < 5
    assert p.mean() == pytest.approx(0.5, abs=0.03)


def test_p_values_equal_those_of_crepes() -> None:
    pytest.importorskip("crepes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from crepes import ConformalClassifier

    rng = np.random.default_rng(1)
    for n in (1, 19, 100):
        for calibration in (rng.normal(size=n), rng.integers(0, 4, n).astype(float)):
            scores = np.concatenate([rng.normal(size=40), calibration, rng.integers(-1, 5, 20)])
            classifier = ConformalClassifier()
            classifier.fit(calibration)
            expected = classifier.predict_p(scores[:, None], smoothing=False)
            assert p_values(scores, calibration) == pytest.approx(expected[:, 0], abs=1e-12)


@given(SCORES, st.integers(-4, 4).map(float))
def test_a_score_is_above_the_threshold_if_its_p_value_is_small(
    calibration: list[float], score: float
) -> None:
    n = len(calibration)
    for k in range(1, n + 1):
        is_above = score > threshold_of(calibration, k)
        assert is_above == (p_values(score, calibration)[0] <= average_rate(k, n))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_threshold_needs_a_rank_among_the_scores(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, but there are 3"):
        threshold_of([1.0, 2.0, 3.0], k)


@given(st.integers(1, 6), st.data(), st.integers(0, 100_000))
def test_the_rank_is_the_floor_of_the_decimal_product(
    digits: int, data: st.DataObject, n: int
) -> None:
    number = data.draw(st.integers(1, 10**digits - 1))
    exact = Fraction(number, 10**digits)
    assert rank_of(number / 10**digits, n) == int(exact * (n + 1))


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16, str, Fraction])
def test_rates_of_any_type_mean_their_decimals(kind: type) -> None:
    alpha: Any = kind(0.29) if kind is not Fraction else Fraction(29, 100)
    assert plain_rate(alpha) == pytest.approx(0.29, abs=1e-12 if kind is not np.float16 else 1e-3)
    assert rank_of(alpha, 99) == 29
    assert type(plain_rate(alpha)) is float


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, float("nan"), INF])
def test_a_rate_lies_between_zero_and_one(alpha: float) -> None:
    for function in (plain_rate, normals_needed, lambda rate: rank_of(rate, 10)):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got"):
            function(alpha)


@pytest.mark.parametrize("confidence", [0, 1, -1.0, 2, float("nan")])
def test_a_confidence_lies_between_zero_and_one(confidence: float) -> None:
    for function in (
        lambda: rank_of(0.05, 100, confidence),
        lambda: guaranteed_rate(1, 100, confidence),
        lambda: binomial_interval(1, 100, confidence),
    ):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
            function()


@pytest.mark.parametrize("n", [1, 2, 6, 48, 106, 1000, 99_999])
@pytest.mark.parametrize("confidence", [None, 0.95, 0.5])
def test_the_smallest_rate_of_a_number_of_images_needs_that_number(
    n: int, confidence: float | None
) -> None:
    alpha = smallest_alpha(n, confidence)
    assert rank_of(alpha, n, confidence) == 1
    assert normals_needed(alpha, confidence) == n
    assert rank_of(np.nextafter(alpha, 0), n, confidence) == 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_one_image_less_is_too_few(alpha: float, confidence: float | None) -> None:
    needed = normals_needed(alpha, confidence)
    assert rank_of(alpha, needed, confidence) >= 1
    assert rank_of(alpha, needed - 1, confidence) == 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [0, 1, 5, 19, 100, 300])
def test_the_guaranteed_rank_is_the_largest_with_that_quantile(alpha: float, n: int) -> None:
    ranks = [k for k in range(1, n + 1) if stats.beta.ppf(0.95, k, n + 1 - k) <= alpha]
    assert rank_of(alpha, n, 0.95) == max(ranks, default=0) <= rank_of(alpha, n) <= n


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 19), (1, 2995), (2, 40), (5, 100), (100, 100)])
def test_the_guaranteed_rate_is_a_quantile_of_the_beta_distribution(k: int, n: int) -> None:
    rate = guaranteed_rate(k, n)
    assert stats.beta.cdf(rate, k, n + 1 - k) == pytest.approx(0.95, rel=1e-9)
    # The rate of a threshold is at most r if at least k of n uniform scores fall above 1 - r.
    assert stats.binom.sf(k - 1, n, rate) == pytest.approx(0.95, rel=1e-9)


def test_no_rank_has_no_false_alarms() -> None:
    assert guaranteed_rate(0, 10) == average_rate(0, 10) == rank_of(0.5, 0) == 0
    for k, n in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="calibration scores"):
            guaranteed_rate(k, n)
    with pytest.raises(ValueError, match="number of calibration scores must be 1 or more, got 0"):
        smallest_alpha(0)


def test_small_rates_are_fast() -> None:
    start = time.process_time()
    assert normals_needed(1e-6) == 999_999
    assert normals_needed(1e-6, 0.95) == 2_995_731
    assert rank_of(0.05, 10**7, 0.95) == 498_867
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("count", "total"), [(0, 1), (1, 1), (0, 10), (3, 10), (189, 189), (7, 98)]
)
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_equal_those_of_scipy(count: int, total: int, confidence: float) -> None:
    expected = stats.binomtest(count, total).proportion_ci(confidence, method="exact")
    interval = binomial_interval(np.int64(count), total, confidence)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_an_interval_needs_a_count_of_a_total(count: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count} of {total}"):
        binomial_interval(count, total)


@given(st.lists(st.integers(1, 20), max_size=30), st.sampled_from([0.05, 0.1, 0.29, 0.7]))
def test_rejections_equal_those_of_scipy(numerators: list[int], rate: float) -> None:
    p = np.array(numerators) / 20
    adjusted = stats.false_discovery_control(p, method="bh") if len(p) else p
    assert benjamini_hochberg(p, rate).tolist() == (adjusted <= rate + 1e-12).tolist()


def test_a_p_value_on_the_limit_is_rejected() -> None:
    assert benjamini_hochberg([0.1] * 3, 0.1).all()
    for m in range(1, 300):  # 0.29 m / m may be above or below 0.29
        assert benjamini_hochberg(np.full(m, 0.29), 0.29).all()
    assert not benjamini_hochberg([0.05001], 0.05).any()


@pytest.mark.parametrize("values", [[-0.1], [0.5, 1.1], [np.nan], [INF]])
def test_rejections_need_p_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="p-values"):
        benjamini_hochberg(values, 0.1)


@pytest.mark.parametrize("rate", [0, 1, 2.0])
def test_a_false_discovery_rate_lies_between_zero_and_one(rate: float) -> None:
    with pytest.raises(ValueError, match=r"fdr must be in \(0, 1\)"):
        benjamini_hochberg([0.5], rate)
