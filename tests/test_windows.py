"""Windows assign every score to one bin, and hand back what they cannot separate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anomaly_clip.metrics.bins import Bins, joined
from anomaly_clip.metrics.windows import (
    FEW,
    NUM_BINS,
    HalfWindow,
    LinearWindow,
    Pixels,
    halves,
    separated,
    sorted_bins,
)

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-20, 6e-8, 65519.0, 65521.0, 1e30, -1e30, 3.4e38, -3.4e38]


def pixels(scores: NDArray[np.float32], seed: int = 0, share: float = 0.1) -> Pixels:
    """Return scores of which some, drawn at random, are anomalous."""
    rng = np.random.default_rng(seed)
    chosen = rng.random(len(scores)) < share
    return Pixels(scores, scores[chosen], rng.random(int(chosen.sum())))


def in_range(low: float, high: float, count: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    scores = (low + (high - low) * rng.random(count)).astype(np.float32)
    return np.clip(scores, np.float32(low), np.float32(high))


def metrics_of(bins: Bins) -> dict[str, float]:
    ranked, exact = bins.ranked()
    return ranked.metrics(exact, 0.3)


def totals(bins: Bins) -> tuple[int, int, float]:
    return int(bins.anomalous.sum()), int(bins.normal.sum()), float(bins.regions.sum())


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=50), floats)
def test_a_window_holds_its_range_and_each_score_lies_in_its_bin(
    scores: list[float], other: float
) -> None:
    low, high = min(scores), max(scores)
    window = LinearWindow.around(low, high)
    array = np.array([*scores, *EXTREMES, other], np.float32)
    keys = np.asarray(window.keys(array))
    assert ((keys[: len(scores)] > 0) & (keys[: len(scores)] < window.last)).all()
    assert (np.diff(keys[np.argsort(array)].astype(int)) >= 0).all()
    bottom, top = window.edges(np.arange(NUM_BINS))
    inside = (keys > 0) & (keys < window.last)
    assert (bottom[keys] <= array)[inside].all()
    assert (array <= top[keys])[inside].all()
    # The flag of exact bins, found without the edges, agrees with them.
    assert (bottom[keys] == top[keys])[inside & window.exact[keys]].all()


def test_a_window_on_another_device_has_the_same_keys() -> None:
    for low, high in ((0, 1), (1000, 1001), (-1e-42, 1e-42), (-3e38, 3e38), (1e-9, 1.1e-9)):
        scores = in_range(low, high, 5000)
        window = LinearWindow.around(low, high)
        tensor = window.keys(torch.from_numpy(scores))
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.numpy() == window.keys(scores)).all()
        some = pixels(scores)
        on_device = some._replace(scores=torch.from_numpy(scores))
        rest, other = window.count(some), LinearWindow.around(low, high).count(on_device)
        assert (rest is None) == (other is None)
        if rest is not None and other is not None:
            assert np.array_equal(np.asarray(other.cpu().scores), np.asarray(rest.scores))
            assert (other.weights == rest.weights).all()


def test_the_range_covers_a_good_part_of_a_window() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = float(np.float32(rng.normal() * 10.0 ** rng.integers(-30, 30)))
        high = float(np.float32(low + abs(low) * 10.0 ** rng.integers(-2, 3)))
        keys = np.asarray(LinearWindow.around(low, high).keys(np.array([low, high], np.float32)))
        assert 0.39 < (int(keys[1]) - int(keys[0])) / NUM_BINS < 0.82


def test_close_scores_have_a_bin_each() -> None:
    for start in (1000.0, 0.5, -3.0, 1e-40, 1e30):
        scores = [np.float32(start)]
        for _ in range(2000):
            scores.append(np.nextafter(scores[-1], np.float32(math.inf)))
        array = np.array(scores)
        window = LinearWindow.around(float(array.min()), float(array.max()))
        assert window.count(pixels(np.repeat(array, 20))) is None
        bins = window.bins()
        assert bins.exact.all()
        assert (bins.low == array).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_precision_have_a_bin_each(dtype: torch.dtype) -> None:
    values = torch.tensor([-3.5, -0.001, -0.0, 0.0, 0.25, 7.0]).to(dtype)
    patterns = values.view(torch.int16).numpy().view(np.uint16)
    window = HalfWindow(dtype)
    assert window.count(Pixels(patterns, patterns[:3], np.ones(3))) is None
    bins = window.bins()
    order = np.argsort(bins.low)
    assert bins.low[order].tolist() == values.double().unique().tolist()
    assert bins.total[order].tolist() == [1, 1, 2, 1, 1]  # both zeros share a bin
    assert bins.anomalous[order].tolist() == [1, 1, 1, 0, 0]


def test_pixels_outside_and_in_crowded_bins_are_handed_back() -> None:
    scores = np.concatenate(
        [in_range(0, 1, 50_000), np.full(5000, 0.5, np.float32), np.array([7, -7], np.float32)]
    )
    some = pixels(scores)
    window = LinearWindow.around(0, 1)
    rest = window.count(some)
    assert rest is not None
    kept = np.asarray(rest.scores)
    assert {7.0, -7.0} <= set(kept.tolist())
    assert (kept == 0.5).sum() == 5000
    assert totals(window.bins())[0] + len(rest.defects) == len(some.defects)
    assert totals(window.bins())[2] + rest.weights.sum() == pytest.approx(some.weights.sum())
    above = np.sort(scores)[::-1]
    for low, high, total in zip(*window.bins()[:2], window.bins().total, strict=True):
        if low < high and total > 1:
            assert total <= (above >= low).sum() / window.cells


CASES = {
    "clusters": np.concatenate([in_range(0, 1e-6, 30_000), in_range(1, 1.00001, 30_000)]),
    "powers": np.exp(in_range(-60, 60, 60_000)),
    "bytes": np.round(in_range(0, 1, 60_000) * 255) / np.float32(255),
    "clipped": np.clip(in_range(-1, 2, 60_000), 0, 1),
    "extremes": np.random.default_rng(0).choice(np.array(EXTREMES, np.float32), 60_000),
    "few": in_range(0, 1, FEW),
    "constant": np.full(60_000, 0.3, np.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_separated_bins_are_those_of_the_sorted_pixels(name: str) -> None:
    some = pixels(CASES[name].astype(np.float32))
    plain, fast = sorted_bins(some), separated(some)
    assert totals(fast)[:2] == totals(plain)[:2]
    assert totals(fast)[2] == pytest.approx(totals(plain)[2])
    assert plain.exact.all()
    # Counts of each fast bin equal those of the scores in it.
    fast = fast.take(np.argsort(fast.low))
    assert (fast.low[1:] > fast.high[:-1]).all()
    first = np.searchsorted(plain.low, fast.low)
    last = np.searchsorted(plain.low, fast.high, side="right")
    for ours, theirs in zip(fast[2:], plain[2:], strict=True):
        sums = np.concatenate([[0], theirs.cumsum()])
        np.testing.assert_allclose(ours, sums[last] - sums[first], atol=1e-9)
    for metric, value in metrics_of(fast).items():
        assert value == pytest.approx(metrics_of(plain)[metric], abs=2e-4)
    for low, high in fast.bounds(0.3).values():
        assert high - low < 2e-3
    if name in ("extremes", "few", "constant"):
        assert fast.exact.all()


def test_the_number_of_separated_bins_is_bounded() -> None:
    assert len(separated(pixels(CASES["powers"].astype(np.float32))).low) <= 1 << 14


def test_halves_cut_scores_between_as_many_numbers() -> None:
    some = pixels(np.array([1e-30, 1e-20, 0.1, 1e20, 1e30], np.float32), share=1)
    lower, upper = halves(some)
    assert np.asarray(lower.scores).tolist() == some.scores[:3].tolist()
    assert lower.defects.tolist() == some.defects[:3].tolist()
    assert upper.weights.tolist() == some.weights[3:].tolist()
    below, above = halves(pixels(np.array([-8, -4, 4, 8], np.float32), share=1))
    assert np.asarray(below.scores).tolist() == [-8, -4]
    assert np.asarray(above.scores).tolist() == [4, 8]


def test_windows_of_similar_ranges_have_the_same_bins_and_add_up() -> None:
    left, right = LinearWindow.around(0.01, 0.9), LinearWindow.around(0.02, 0.95)
    assert left.same_bins(right)
    assert not left.same_bins(LinearWindow.around(0, 9))
    whole = LinearWindow.around(0.01, 0.9)
    scores = np.linspace(0.05, 0.85, 20_000, dtype=np.float32)
    halves_of = [pixels(scores[seed::2], seed) for seed in range(2)]
    for window, some in zip((left, right), halves_of, strict=True):
        assert window.count(some) is None
        whole.count(some)
    both, alone = joined([left.bins(), right.bins()]), whole.bins()
    assert all(np.allclose(ours, theirs) for ours, theirs in zip(both, alone, strict=True))
