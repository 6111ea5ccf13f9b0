from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.data.transforms import MaskFilter, Resize, resize_image, resize_mask


def test_images_are_resized_by_pil_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_image(image, 16), np.asarray(expected))


def test_downsizing_is_antialiased() -> None:
    """A one-pixel checkerboard becomes grey; without antialiasing it would stay black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize_image(np.repeat(board[..., None], 3, axis=2), 8)
    assert abs(small.astype(int) - 127).max() <= 2


def test_an_image_of_the_requested_size_is_returned_unchanged() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert resize_image(image, 8) is image


@pytest.mark.parametrize(
    ("kind", "threshold", "expected"),
    [("bilinear", 0.5, 2), ("nearest", 0.5, 2), ("bilinear", 0.9, 1)],
)
def test_masks_are_thresholded(kind: MaskFilter, threshold: float, expected: int) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :5] = True  # resized to 4 pixels: full, full, about half, empty
    small = resize_mask(mask, 4, kind, threshold)
    assert small.dtype == bool
    assert (small.sum(axis=1) >= expected).all()
    assert not small[:, 3].any()


def test_a_tiny_defect_vanishes_from_a_bilinear_mask() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[3, 3] = True
    assert not resize_mask(mask, 8).any()


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (33, 47), (20, 20)])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "lanczos"])
def test_crops_match_torchvision(shape: tuple[int, int], kind: str) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as reference

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture, mode = Image.fromarray(image), InterpolationMode(kind)
    for rule, size in (("square_crop", [21, 21]), ("shorter_crop", [21])):
        expected = reference.center_crop(reference.resize(picture, size, mode), [16, 16])
        ours = resize_image(image, 16, Resize(rule, 21, kind))  # type: ignore[arg-type]
        assert np.array_equal(ours, np.asarray(expected))


def test_grey_masks_keep_their_values_until_the_threshold() -> None:
    mask = np.full((8, 8), 100, np.uint8)
    mask[:, 4:] = 160
    assert not resize_mask(mask, 8, threshold=0.5)[:, :4].any()
    assert resize_mask(mask, 8, threshold=0.5)[:, 4:].all()
    assert resize_mask(mask, 8, threshold=0.3).all()


@pytest.mark.parametrize("size", range(16, 25))
def test_crops_begin_where_torchvisions_do(size: int) -> None:
    """If the margin is odd, torchvision rounds the half pixel to the even one."""
    from torchvision.transforms.functional import center_crop

    image = np.arange(size * (size + 3), dtype=np.uint8).reshape(size, size + 3)
    expected = np.asarray(center_crop(Image.fromarray(image), [16, 16]))
    resize = Resize("shorter_crop", size)
    assert np.array_equal(resize_image(np.dstack([image] * 3), 16, resize)[..., 0], expected)
    square = image[:, :size]
    mask = square > 100
    cut = np.asarray(center_crop(Image.fromarray(mask), [16, 16]))
    assert np.array_equal(resize_mask(mask, 16, resize=Resize("square_crop", size)), cut)
