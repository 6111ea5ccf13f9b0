from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.methods import nearest_patches
from anomaly_clip.methods.nearest_patches import (
    batched_distances,
    check_one_layer,
    cosine_distances,
)


def units(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*size, 5, generator=generator), dim=-1)


@pytest.mark.parametrize("num_neighbours", [1, 3, 11, 50])
@pytest.mark.parametrize("at_once", [1 << 24, 30])
def test_distances_are_those_of_scikit_learn(
    num_neighbours: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_patches, "AT_ONCE", at_once)
    patches, bank = units(2, 7), units(11, seed=1)
    search = NearestNeighbors(metric="cosine", algorithm="brute").fit(bank.numpy())
    count = min(num_neighbours, 11)  # all rows of a smaller memory
    expected, _ = search.kneighbors(patches.flatten(0, 1).numpy(), count)
    distances = cosine_distances(patches, bank, num_neighbours)
    assert_close(distances.flatten().numpy(), expected.mean(axis=1), atol=1e-6, rtol=0)


def official(patches: Tensor, row: int, quantile: float) -> np.ndarray:
    """Return the distances of the official code, for k of 2 or more and no equal distances."""
    others = torch.cat([patches[:row], patches[row + 1 :]]).flatten(0, 1).double().numpy()
    distances = 1 - patches[row].double().numpy() @ others.T
    k = int(quantile * len(others))
    bounds = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    below = distances < bounds
    return np.where(below, distances, 0).sum(axis=1) / below.sum(axis=1)


@pytest.mark.parametrize("quantile", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("at_once", [1 << 24, 50])
def test_batched_distances_are_those_strictly_below_the_kth(
    quantile: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_patches, "AT_ONCE", at_once)
    patches = units(4, 9)
    for row in range(4):
        distances = batched_distances(patches, row, quantile).numpy()
        assert_close(
            distances, official(patches, row, quantile).astype(np.float32), atol=1e-6, rtol=0
        )


def test_few_patches_are_compared_with_the_nearest_one() -> None:
    """The official code returns NaN for a k of 1, and averages the distances below 0 if k is 0."""
    patches = units(3, 4)
    for quantile in (0.001, 1 / 8, 2 / 8):
        nearest = cosine_distances(patches[1:2], patches[[0, 2]].flatten(0, 1))[0]
        assert_close(batched_distances(patches, 1, quantile), nearest)


def test_equal_patches_have_distance_zero() -> None:
    patches = units(1, 1).repeat(3, 4, 1)
    assert_close(batched_distances(patches, 0, 0.5), torch.zeros(4), atol=1e-6, rtol=0)


def test_one_layer_is_required() -> None:
    check_one_layer([3], "M")
    with pytest.raises(ValueError, match=r"\[3, 4\]: M compares patches of one layer; give one"):
        check_one_layer([3, 4], "M")
