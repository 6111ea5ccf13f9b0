from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch.testing import assert_close

from anomaly_clip.methods import gaussians as gaussians_module
from anomaly_clip.methods.gaussians import RunningMoments, few_sample_gaussians, inverse_factor


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: in many small matrix products, several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "channels"), [(6, 20), (12, 5), (2, 4)])
def test_distances_without_a_covariance_match_scipy(
    count: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five positions are factored in three parts.
    monkeypatch.setattr(gaussians_module, "FACTORED_AT_ONCE", 2)
    rng = np.random.default_rng(1)
    samples = 3 + rng.normal(0, 2, (count, 5, channels))
    samples[-1] = samples[0]  # reduces the rank further
    features = torch.from_numpy(samples)
    gaussians = few_sample_gaussians(lambda positions: features[:, positions], 5, 0.01)
    other = torch.from_numpy(rng.normal(3, 2, (3, 5, channels)))
    distances = gaussians.distances(other)
    for position in range(5):
        covariance = np.cov(samples[:, position], rowvar=False) + 0.01 * np.eye(channels)
        inverted = np.linalg.inv(covariance)
        for image in range(3):
            expected = mahalanobis(other[image, position], samples[:, position].mean(0), inverted)
            assert float(distances[image, position]) == pytest.approx(expected, rel=1e-7)
    single = few_sample_gaussians(lambda positions: features[:, positions].float(), 5, 0.01)
    assert single.mean.dtype == torch.float32
    assert_close(single.distances(other.float()), distances.float(), atol=1e-3, rtol=1e-4)


def test_moments_match_numpy_for_any_batch_sizes() -> None:
    rng = np.random.default_rng(0)
    features = 1000 + rng.normal(0, 1, (150, 4, 3))
    for sizes in ([150], [1] * 150, [70, 80], [30, 64, 6, 50], [64, 1, 63, 22]):
        moments = RunningMoments()
        for part in torch.from_numpy(features).split(sizes):
            moments.add(part)
        count, mean, scatter = moments.take()
        assert count == 150
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
        for position in range(4):
            expected = np.cov(features[:, position], rowvar=False) * 149
            np.testing.assert_allclose(scatter[position], expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="at least 1 image, got 0: call add first"):
        RunningMoments().take()


def test_a_singular_covariance_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.regularization 1e-30 is too small"):
        inverse_factor(torch.full((2, 3, 3), 1e9, dtype=torch.float64), 5, 1e-30)
