"""Pixel metrics of histograms and their bounds, compared with metrics of individual pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_clip.metrics.bins import Bins
from anomaly_clip.metrics.image import auroc, average_precision, f1_max

# Three keys (histogram bins), highest score first; all anomalous pixels form one region.
HAND = Bins(np.array([2, 1, 0]), np.array([0, 1, 2]), np.array([2 / 3, 1 / 3, 0.0]))


def pixels_of(bins: Bins) -> tuple[Tensor, Tensor]:
    """Return the score and label of every pixel in a histogram."""
    scores, labels = [], []
    for place, (anomalous, normal) in enumerate(zip(bins.anomalous, bins.normal, strict=True)):
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
def test_a_histogram_ranks_like_its_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    anomalous, normal = rng.integers(0, 4, 30), rng.integers(0, 9, 30)
    ranking = Bins(anomalous, normal, anomalous / anomalous.sum()).ranking()
    scores, labels = pixels_of(Bins(anomalous, normal, np.zeros(30)))
    assert ranking.auroc() == auroc(scores, labels)
    assert ranking.average_precision() == average_precision(scores, labels)
    assert ranking.f1_max() == f1_max(scores, labels)


def test_a_single_class_is_undefined() -> None:
    none = np.zeros(3, np.int64)
    assert not HAND._replace(anomalous=none).ranking().defined
    assert not HAND._replace(normal=none).ranking().defined
    assert HAND.ranking().defined


def test_bounds_hold_for_every_order_inside_a_key() -> None:
    bins = Bins(np.array([1, 2]), np.array([2, 1]), np.array([1 / 3, 2 / 3]))
    bounds = bins.bounds(0.3)
    first, second = [True, False, False], [True, True, False]
    for orders in itertools.product(
        set(itertools.permutations(first)), set(itertools.permutations(second))
    ):
        labels = torch.tensor([*orders[0], *orders[1]])
        scores = -torch.arange(6.0)
        for name, metric in (("auroc", auroc), ("ap", average_precision), ("f1_max", f1_max)):
            low, high = bounds[f"pixel_{name}"]
            assert low - 1e-12 <= metric(scores, labels) <= high + 1e-12
