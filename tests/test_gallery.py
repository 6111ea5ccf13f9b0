from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.recording.gallery import GAP, PANEL, join_panels, panel_size


@pytest.mark.parametrize(("shape", "size"), [((40, 80), (96, 192)), ((500, 100), (192, 38))])
def test_panels_keep_the_shape_of_the_image(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    mask = np.zeros(shape, bool)
    mask[: shape[0] // 2] = True
    sheet = join_panels(image, np.zeros((7, 9), np.float32), (0.0, 1.0), mask)
    assert sheet.shape == (size[0], 4 * size[1] + 3 * GAP, 3)
    assert (sheet[:, : size[1]] == 90).all()
    white = sheet[:, 3 * (size[1] + GAP) :].mean(axis=(1, 2))
    assert white[0] == 255
    assert white[-1] == 0
    assert join_panels(image, np.zeros((7, 9)), (0, 1), None).shape[1] == 3 * size[1] + 2 * GAP
    assert panel_size(shape) == size[::-1]


def test_the_scale_is_that_of_the_category() -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    values = np.full((10, 10), 0.5, np.float32)
    dark, bright = (join_panels(image, values, scale, None) for scale in ((0.5, 1), (0, 0.5)))
    assert dark[:, 2 * (PANEL + GAP) :].max() < 10
    assert bright[:, 2 * (PANEL + GAP) :].max() > 240
    assert 0.7 * 240 < bright[:, PANEL + GAP : 2 * PANEL].max() < 0.8 * 255  # not opaque


def test_contour_and_outline_are_on_the_overlay_and_a_dark_heat_map_is_left_out() -> None:
    image = np.full((192, 192, 3), 90, np.uint8)
    values = np.zeros((96, 96), np.float32)
    values[40:60, 40:60] = 1.0
    mask = np.zeros((192, 192), bool)
    mask[20:60, 20:60] = True
    plain = join_panels(image, values, (0.5, 1.0), None)
    assert (plain[:, :PANEL] == 90).all()
    overlay = slice(PANEL + GAP, 2 * PANEL + GAP)
    for sheet, first in (
        (join_panels(image, values, (0.5, 1.0), None, 0.5), 80),
        (join_panels(image, values, (0.5, 1.0), mask), 20),
    ):
        drawn = (sheet[:, overlay] != plain[:, overlay]).any(axis=2)
        rows = np.flatnonzero(drawn.any(axis=1))
        assert abs(rows[0] - first) <= 3
        assert not drawn[rows[0] + 8 : rows[0] + 28, rows[0] + 8 : rows[0] + 28].any()  # a line
        assert (sheet[:, :PANEL] == 90).all()
        assert (
            sheet[:, overlay.stop : 3 * PANEL + GAP] == plain[:, overlay.stop :][:, :PANEL]
        ).all()
    assert join_panels(image, values, None, None, 0.5).shape == (192, 192, 3)
