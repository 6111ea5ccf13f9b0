from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.data.transforms import MaskFilter, resize_image, resize_mask


def test_images_are_resized_by_pil_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_image(image, 16), np.asarray(expected))


def test_downsizing_is_antialiased() -> None:
    """A one-pixel checkerboard becomes grey; without antialiasing it would stay black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize_image(np.repeat(board[..., None], 3, axis=2), 8)
    assert abs(small.astype(int) - 127).max() <= 2


def test_equal_sizes_pass_untouched() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert resize_image(image, 8) is image


@pytest.mark.parametrize(
    ("kind", "threshold", "expected"),
    [("bilinear", 0.5, 2), ("nearest", 0.5, 2), ("bilinear", 0.9, 1)],
)
def test_masks_are_thresholded(kind: MaskFilter, threshold: float, expected: int) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :5] = True  # to 4 pixels: full, full, half and half of the next weighed in, empty
    small = resize_mask(mask, 4, kind, threshold)
    assert small.dtype == bool
    assert (small.sum(axis=1) >= expected).all()
    assert not small[:, 3].any()


def test_a_tiny_defect_vanishes_from_a_bilinear_mask() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[3, 3] = True
    assert not resize_mask(mask, 8).any()
