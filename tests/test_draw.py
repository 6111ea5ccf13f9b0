"""Captions and grids shared by all drawings."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.drawing.draw import ALARM, INK, add_caption, font, grid


def panel(level: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (level, level, level))


def test_panels_lie_row_by_row_with_gaps() -> None:
    sheet = np.asarray(grid([panel(n) for n in (10, 20, 30)], 2, gap=3, before=1, after=2))
    assert sheet.shape == (1 + 4 + 3 + 4 + 2, 1 + 6 + 3 + 6 + 2, 3)
    expected = np.full(sheet.shape, 255, np.uint8)
    expected[1:5, 1:7] = 10
    expected[1:5, 10:16] = 20
    expected[8:12, 1:7] = 30
    np.testing.assert_array_equal(sheet, expected)


def test_a_grid_of_one_panel_is_the_panel() -> None:
    np.testing.assert_array_equal(np.asarray(grid([panel(7)], 1, gap=5)), np.asarray(panel(7)))


@pytest.mark.parametrize("min_width", [0, 90])
def test_a_caption_stands_above_the_image(min_width: int) -> None:
    lines = [("plain", INK), ("warning", ALARM)]
    sheet = np.asarray(
        add_caption(panel(0), lines, line_height=16, above=2, below=3, min_width=min_width)
    ).astype(int)
    top = 2 + 2 * 16 + 3
    assert sheet.shape[:2] == (top + 4, max(6, min_width))
    assert (sheet[top:, :6] == 0).all()
    if min_width:
        red = sheet[..., 0] - sheet[..., 1] > 100
        assert red[18:top].any()
        assert not red[:18].any()


def test_a_font_is_loaded_once() -> None:
    assert font(12) is font(12)
    assert font(12).getlength("wide") < font(24).getlength("wide")
