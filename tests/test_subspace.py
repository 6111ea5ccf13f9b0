from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.methods.gaussians import RunningMoments
from anomaly_clip.methods.subspace import (
    Subspace,
    check_subspace,
    official_blocks,
    patch_features,
    principal_subspace,
    smoothed_maps,
    top_mean,
)


def patches(count: int, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** -torch.arange(width)
    return torch.randn(count, width, generator=generator) * scales + 5


def fit(features: Tensor, explained: float) -> Subspace:
    moments = RunningMoments()
    moments.add(features.unsqueeze(1))
    return principal_subspace(moments.take(), explained)


@pytest.mark.parametrize("explained", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("count", [6, 60])
def test_the_subspace_is_that_of_scikit_learn(explained: float, count: int) -> None:
    features = patches(count)
    pca = PCA(n_components=explained, svd_solver="full").fit(features.double().numpy())
    subspace = fit(features, explained)
    assert subspace.components.shape == (8, pca.n_components_)
    assert_close(subspace.eigenvalues.numpy(), pca.explained_variance_, atol=1e-9, rtol=1e-6)
    probe = patches(5, seed=1).double()
    rebuilt = pca.inverse_transform(pca.transform(probe.numpy()))
    expected = ((probe.numpy() - rebuilt) ** 2).sum(axis=1)
    assert_close(subspace.distances(probe).numpy(), expected, atol=1e-9, rtol=1e-6)
    inside = pca.transform(probe.numpy())
    euclidean = subspace.distances(probe, "euclidean").numpy()
    assert_close(euclidean, (inside**2).sum(axis=1), atol=1e-9, rtol=1e-6)
    cosine = (probe.numpy() * rebuilt).sum(axis=1)
    cosine /= np.linalg.norm(probe, axis=1) * np.linalg.norm(rebuilt, axis=1)
    assert_close(subspace.distances(probe, "cosine").numpy(), 1 - cosine, atol=1e-9, rtol=1e-6)


def test_mahalanobis_distances_with_all_directions() -> None:
    features, probe = patches(60).double(), patches(5, seed=1).double()
    subspace = fit(features, 1.0)
    assert subspace.components.shape == (8, 8)
    expected = EmpiricalCovariance().fit(features.numpy()).mahalanobis(probe.numpy()) * 59 / 60
    widened = subspace._replace(eigenvalues=subspace.eigenvalues - 1e-6)  # added by the code
    assert_close(widened.distances(probe, "mahalanobis").numpy(), expected, atol=1e-7, rtol=1e-6)


def test_fewer_patches_than_channels_leave_no_noise_in_the_subspace() -> None:
    features = patches(4, width=20)
    subspace = fit(features, 1.0)
    assert subspace.components.shape == (20, 3)
    assert_close(
        subspace.distances(features), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert (subspace.distances(features + torch.eye(20)[19]) > 0.1).all()


def test_a_small_share_keeps_one_component() -> None:
    for explained in (1e-12, 1e-3, 0.3):
        assert fit(patches(60), explained).components.shape == (8, 1)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("distance", ["reconstruction", "mahalanobis", "euclidean", "cosine"])
def test_equal_patches_leave_their_mean(count: int, distance: Any) -> None:
    subspace = fit(torch.ones(1, 4).repeat(count, 1), 0.99)
    assert subspace.components.shape == (4, 0)
    distances = subspace.distances(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 3]]), distance)
    assert distances.isfinite().all()
    if distance == "reconstruction":
        assert distances.tolist() == [0, 4]


class Tower:
    """A backbone of two layers."""

    def __init__(self) -> None:
        self.channels = {1: 3, 2: 3, 3: 5}
        self.strides = {1: 8, 2: 8, 3: 16}
        generator = torch.Generator().manual_seed(0)
        sizes = {1: (2, 3, 4, 4), 2: (2, 3, 4, 4), 3: (2, 5, 2, 2)}
        self.maps = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}

    def feature_maps(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        return [self.maps[layer].half() for layer in layers]


def test_features_are_the_mean_or_all_of_the_layers() -> None:
    tower: Any = Tower()
    images = torch.zeros(2, 3, 32, 32)
    first, second = (tower.maps[layer].half().float() for layer in (1, 2))
    mean = patch_features(tower, images, [1, 2], "mean")
    assert mean.dtype == torch.float32
    assert_close(mean[1, 6], (first[1, :, 1, 2] + second[1, :, 1, 2]) / 2)
    both = patch_features(tower, images, [1, 2], "concat")
    assert_close(both[1, 6], torch.cat([first[1, :, 1, 2], second[1, :, 1, 2]]))
    assert patch_features(tower, images, [1, 3], "concat").shape == (2, 16, 8)


def test_options_are_checked() -> None:
    tower: Any = Tower()
    check_subspace(tower, [1, 3], "concat", 1.0)
    with pytest.raises(ValueError, match=r"\[1, 3\] have different sizes, so they have no mean"):
        check_subspace(tower, [1, 3], "mean", 0.99)
    with pytest.raises(ValueError, match=r"model\.combine must be one of mean, concat, got sum"):
        check_subspace(tower, [1], "sum", 0.99)  # type: ignore[arg-type]
    for explained in (0, 1.01):
        with pytest.raises(ValueError, match=r"model\.explained"):
            check_subspace(tower, [1], "mean", explained)


def test_official_blocks_are_those_of_towers_of_these_depths() -> None:
    assert official_blocks(12) == [8, 9]
    assert official_blocks(40) == list(range(23, 30))
    assert official_blocks(6) == ["layer3"]


def test_maps_are_smoothed_by_three_pixels() -> None:
    grid = torch.arange(12.0).view(1, 3, 4) ** 2
    maps = smoothed_maps(grid, (3, 4))
    expected = gaussian_filter(grid[0].numpy(), sigma=4, radius=1, mode="mirror")
    assert_close(maps[0].numpy(), expected, atol=1e-4, rtol=1e-5)


def test_the_highest_percent_is_rounded_down_to_at_least_one() -> None:
    scores = torch.arange(399.0).flip(0)[None]
    assert top_mean(scores).tolist() == [397]  # int(3.99) = 3 of 398, 397, 396
    assert top_mean(scores[:, :99]).tolist() == [398]
    assert top_mean(torch.zeros(2, 1)).tolist() == [0, 0]
