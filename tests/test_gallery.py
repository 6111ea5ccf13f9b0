from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.recording.gallery import GAP, PANEL, join_panels


@pytest.mark.parametrize(("shape", "size"), [((40, 80), (96, 192)), ((500, 100), (192, 38))])
def test_panels_keep_the_shape_of_the_image(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    mask = np.zeros(shape, bool)
    mask[: shape[0] // 2] = True
    sheet = join_panels(image, np.zeros((7, 9), np.float32), (0.0, 1.0), mask)
    assert sheet.shape == (size[0], 3 * size[1] + 2 * GAP, 3)
    assert (sheet[:, : size[1]] == 90).all()
    white = sheet[:, 2 * (size[1] + GAP) :].mean(axis=(1, 2))
    assert white[0] == 255
    assert white[-1] == 0
    assert join_panels(image, np.zeros((7, 9)), (0, 1), None).shape[1] == 2 * size[1] + GAP


def test_the_scale_is_that_of_the_category() -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    values = np.full((10, 10), 0.5, np.float32)
    dark, bright = (join_panels(image, values, scale, None) for scale in ((0.5, 1), (0, 0.5)))
    assert dark[:, PANEL + GAP :].max() < 10
    assert bright[:, PANEL + GAP :].max() > 240


def test_the_contour_is_on_the_image_and_a_dark_heat_map_is_left_out() -> None:
    image = np.full((192, 192, 3), 90, np.uint8)
    values = np.zeros((96, 96), np.float32)
    values[40:60, 40:60] = 1.0
    sheet = join_panels(image, values, (0.5, 1.0), None, 0.5)
    plain = join_panels(image, values, (0.5, 1.0), None)
    drawn = (sheet[:, :PANEL] != plain[:, :PANEL]).any(axis=2)
    assert drawn.any()
    assert not drawn[:70].any()  # the region begins at row 80 of 192
    assert (sheet[:, PANEL:] == plain[:, PANEL:]).all()
    assert join_panels(image, values, None, None, 0.5).shape == (192, 192, 3)
