from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map, resize_maps


def test_a_hot_patch_stays_where_it_was() -> None:
    scores = torch.zeros(1, 16)
    scores[0, 6] = 1.0  # row 1, column 2 of a 4x4 grid
    hottest = patches_to_map(scores, (4, 4))[0].argmax()
    assert divmod(int(hottest), 4) == (1, 2)


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling_by_hand(align_corners: bool) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    row = patches_to_map(scores, (2, 4), align_corners=align_corners)[0, 0]
    expected = [0, 1 / 3, 2 / 3, 1] if align_corners else [0, 0.25, 0.75, 1]
    torch.testing.assert_close(row, torch.tensor(expected))


def test_upsampling_agrees_with_pil() -> None:
    grid = np.random.default_rng(0).random((5, 5), dtype=np.float32)
    expected = np.asarray(Image.fromarray(grid).resize((35, 35), Image.Resampling.BILINEAR))
    ours = patches_to_map(torch.from_numpy(grid).reshape(1, 25), (35, 35))[0]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_class_token_left_in_is_named() -> None:
    with pytest.raises(ValueError, match="226 patches are not a square"):
        patches_to_map(torch.zeros(1, 226), (240, 240))


def test_equal_sizes_pass_untouched() -> None:
    maps = torch.rand(2, 5, 7)
    assert resize_maps(maps, (5, 7)) is maps


@pytest.mark.parametrize("sigma", [0.4, 2.0, 8.0])
@pytest.mark.parametrize("shape", [(15, 240), (240, 17), (300, 311), (3, 3)])
def test_blur_agrees_with_scipy(sigma: float, shape: tuple[int, int]) -> None:
    maps = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    expected = np.stack([gaussian_filter(m.astype(np.float64), sigma) for m in maps])
    np.testing.assert_allclose(gaussian_blur(torch.from_numpy(maps), sigma), expected, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.2, 9.0), st.integers(0, 99))
def test_blur_on_any_size(height: int, width: int, sigma: float, seed: int) -> None:
    image = np.random.default_rng(seed).normal(size=(height, width))
    ours = gaussian_blur(torch.from_numpy(image)[None], sigma)[0]
    np.testing.assert_allclose(ours, gaussian_filter(image, sigma), atol=1e-9)


def test_blur_keeps_constants_type_and_batch() -> None:
    maps = torch.full((2, 3, 20, 30), 0.7, dtype=torch.float64)
    blurred = gaussian_blur(maps, 3.0)
    assert blurred.dtype == torch.float64
    torch.testing.assert_close(blurred, maps)


def test_no_blur_and_bad_blur() -> None:
    maps = torch.rand(1, 4, 4)
    assert gaussian_blur(maps, 0) is maps
    with pytest.raises(ValueError, match="sigma must be 0 or more"):
        gaussian_blur(maps, -1.0)
    with pytest.raises(ValueError, match="sigma must be 0 or more"):
        gaussian_blur(maps, float("nan"))


def test_a_blur_matrix_cached_without_gradients_works_with_them() -> None:
    with torch.inference_mode():
        gaussian_blur(torch.rand(1, 33, 33), 1.7)
    maps = torch.rand(1, 33, 33, requires_grad=True)
    gaussian_blur(maps, 1.7).sum().backward()
    assert maps.grad is not None
    torch.testing.assert_close(maps.grad.sum(), torch.tensor(33.0 * 33.0))


def test_image_score_rules() -> None:
    maps = torch.arange(200, dtype=torch.float32).reshape(2, 10, 10)
    torch.testing.assert_close(image_score(maps, "max"), torch.tensor([99.0, 199.0]))
    torch.testing.assert_close(image_score(maps, "mean"), torch.tensor([49.5, 149.5]))
    torch.testing.assert_close(image_score(maps, "top_mean", 0.02), torch.tensor([98.5, 198.5]))
    torch.testing.assert_close(image_score(maps, "top_mean", 0.001), torch.tensor([99.0, 199.0]))


def test_image_score_refuses() -> None:
    with pytest.raises(ValueError, match="unknown rule 'median'"):
        image_score(torch.rand(1, 2, 2), "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction must be in"):
        image_score(torch.rand(1, 2, 2), "top_mean", 0.0)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.14, 0.15, 0.5, 1.0])
def test_the_mean_of_the_highest_pixels_equals_numpys(fraction: float) -> None:
    maps = np.random.default_rng(0).random((3, 5, 5), dtype=np.float32)
    count = max(1, int(np.rint(fraction * 25)))
    expected = np.sort(maps.reshape(3, 25), axis=1)[:, -count:].mean(axis=1)
    actual = image_score(torch.from_numpy(maps), "top_mean", fraction)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
