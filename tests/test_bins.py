"""Metrics of bins and their bounds, compared with metrics of individual pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_clip.metrics.bins import Bins, Ranked, grouped, joined, rank_cells
from anomaly_clip.metrics.image import auroc, average_precision, f1_max

# Three scores, highest first; all anomalous pixels form one region.
HAND = Ranked(np.array([2, 1, 0]), np.array([0, 1, 2]), np.array([2 / 3, 1 / 3, 0.0]))


def bins_of(*rows: tuple[float, float, int, int]) -> Bins:
    """Return bins from rows of (low, high, anomalous, normal); one region in all."""
    low, high, anomalous, normal = np.array(rows, np.float64).T
    return Bins(low, high, anomalous.astype(int), normal.astype(int), anomalous / anomalous.sum())


def metrics_of(bins: Bins) -> dict[str, float]:
    ranked, exact = bins.ranked()
    return ranked.metrics(exact, 0.3)


def pixels_of(ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Return the score and label of every pixel."""
    scores, labels = [], []
    for place, (anomalous, normal) in enumerate(zip(ranked.anomalous, ranked.normal, strict=True)):
        scores += [-float(place)] * int(anomalous + normal)
        labels += [True] * int(anomalous) + [False] * int(normal)
    return torch.tensor(scores), torch.tensor(labels)


def test_by_hand() -> None:
    ranking = HAND.ranking()
    # The third anomalous pixel ties with one of the three normal pixels.
    assert ranking.auroc() == pytest.approx((3 + 3 + 2.5) / 9)
    assert ranking.average_precision() == pytest.approx((2 + 3 / 4) / 3)
    assert ranking.f1_max() == pytest.approx(6 / 7)
    # PRO is 2/3 at a false positive rate of 0 and rises to 1 at a rate of 1/3.
    assert HAND.pro(1.0) == pytest.approx((2 / 3 + 1) / 2 / 3 + 2 / 3)
    assert HAND.pro(1 / 3) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_counts_rank_like_their_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    anomalous, normal = rng.integers(0, 4, 30), rng.integers(0, 9, 30)
    ranking = Ranked(anomalous, normal, anomalous / anomalous.sum()).ranking()
    scores, labels = pixels_of(Ranked(anomalous, normal, np.zeros(30)))
    assert ranking.auroc() == auroc(scores, labels)
    assert ranking.average_precision() == average_precision(scores, labels)
    assert ranking.f1_max() == f1_max(scores, labels)


def test_a_single_class_is_undefined() -> None:
    none = np.zeros(3, np.int64)
    assert not HAND._replace(anomalous=none).ranking().defined
    assert not HAND._replace(normal=none).ranking().defined
    assert HAND.ranking().defined


def test_counts_whose_products_do_not_fit_into_64_bits() -> None:
    counts = np.array([3 * 10**9, 0]), np.array([0, 3 * 10**9])
    assert Ranked(*counts, np.array([1.0, 0.0])).ranking().auroc() == 1.0
    assert Ranked(*counts[::-1], np.array([0.0, 1.0])).ranking().auroc() == 0.0
    both = Ranked(counts[0] + counts[1], counts[0] + counts[1], np.array([0.5, 0.5]))
    assert both.ranking().auroc() == pytest.approx(0.5)


def test_bounds_are_reached_by_an_order_inside_the_bins_and_hold_for_all() -> None:
    # Four scores of two overlapping bins, and a tie at 2.5.
    bins = bins_of((1, 3, 1, 2), (2, 4, 2, 1), (2.5, 2.5, 1, 1))
    bounds = bins.bounds(0.3)
    values: dict[str, list[float]] = {name: [] for name in ("auroc", "ap", "f1_max")}
    first = set(itertools.product([1.0, 2.0, 2.5, 3.0], repeat=3))
    second = set(itertools.product([2.0, 2.5, 3.0, 4.0], repeat=3))
    labels = torch.tensor([True, False, False, True, True, False, True, False])
    for some, others in itertools.product(first, second):
        scores = torch.tensor([*some, *others, 2.5, 2.5])
        for name, metric in (("auroc", auroc), ("ap", average_precision), ("f1_max", f1_max)):
            values[name].append(metric(scores, labels))
    for name, of_orders in values.items():
        low, high = bounds[f"pixel_{name}"]
        assert low - 1e-12 <= min(of_orders)
        assert max(of_orders) <= high + 1e-12
    for name in ("auroc", "f1_max"):  # those of AP allow for untied anomalous pixels
        assert bounds[f"pixel_{name}"] == pytest.approx((min(values[name]), max(values[name])))
    for name, value in metrics_of(bins).items():
        assert bounds[name][0] <= value <= bounds[name][1]


def test_exact_bins_have_no_width() -> None:
    bins = bins_of((0.1, 0.1, 3, 5), (0.7, 0.7, 4, 2))
    scores, labels = pixels_of(bins.ranked()[0])
    metrics = metrics_of(bins)
    assert metrics["pixel_ap"] == pytest.approx(average_precision(scores, labels), abs=1e-15)
    for name, (low, high) in bins.bounds(0.3).items():
        assert low == pytest.approx(high, abs=1e-15)
        assert metrics[name] == pytest.approx(low, abs=1e-15)


def test_equal_bins_are_added_and_others_kept() -> None:
    first, other = bins_of((0, 1, 2, 3), (1, 2, 1, 0)), bins_of((1, 2, 4, 5), (1, 3, 1, 1))
    both = joined([first, other])
    assert list(zip(both.low, both.high, both.anomalous, both.normal, strict=True)) == [
        (0, 1, 2, 3),
        (1, 2, 5, 5),
        (1, 3, 1, 1),
    ]
    assert both.regions.sum() == pytest.approx(2)
    table = Bins.from_table(both.table())
    assert all((ours == theirs).all() for ours, theirs in zip(table, both, strict=True))


def test_a_group_holds_a_constant_fraction_of_the_pixels_above_it() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.random(20_000))
    ones = np.ones(len(values), np.int64)
    bins = Bins(values, values, ones // 2, ones, np.zeros(len(values)))
    groups = grouped(bins, 64)
    assert groups.total.sum() == len(values)
    above = groups.total.cumsum() - groups.total
    assert (groups.total <= 1 + (above + groups.total) / 64 + 1).all()
    assert len(groups.low) < 64 * 8
    assert (groups.low <= groups.high).all()
    assert (groups.high[1:] < groups.low[:-1]).all()  # still in order, and disjoint
    assert (rank_cells(np.arange(64), 64) == np.arange(64)).all()


def test_a_full_exact_bin_stays_exact_in_a_group() -> None:
    values = np.arange(1000.0)
    normal = np.ones(1000, np.int64)
    normal[500] = 10_000
    groups = grouped(Bins(values, values, normal * 0, normal, np.zeros(1000)), 16)
    place = int(np.flatnonzero(groups.normal >= 10_000)[0])
    assert (groups.low[place], groups.high[place], groups.normal[place]) == (500, 500, 10_000)


def test_a_threshold_inside_a_bin_splits_it() -> None:
    bins = bins_of((0, 1, 0, 8), (0.5, 1.5, 4, 0))
    area, (low, high) = bins.stepwise_pro(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 1.0)
    assert low <= area <= high
    # Split in proportion, false positive rates are 0.75, 0.5, 0.25 and 0, and overlaps are 1, 1,
    # 0.75 and 0.5; the first threshold has a rate of 1, which is not below the limit.
    assert area == pytest.approx((1 + 0.875 + 0.625) / 3)
