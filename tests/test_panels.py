from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.drawing.panels import draw_panels, heat_map


def brightness(image: np.ndarray) -> np.ndarray:
    return image.astype(float).mean(axis=-1)


def test_heat_grows_with_the_value_and_is_clipped() -> None:
    colours = heat_map(np.array([[-9.0, 0.0, 0.5, 1.0, 9.0]]), 0.0, 1.0)[0]
    levels = brightness(colours)
    assert levels[0] == levels[1] < levels[2] < levels[3] == levels[4]
    assert colours[3][0] > colours[3][2]  # the bright end of the scale is yellow: red above blue


def test_a_constant_category_is_drawn_dark() -> None:
    assert brightness(heat_map(np.full((2, 2), 3.0), 3.0, 3.0)).max() < 5


@pytest.mark.parametrize("with_mask", [True, False])
def test_panels_stand_side_by_side(with_mask: bool) -> None:
    image = np.full((60, 60, 3), 200, dtype=np.uint8)
    values = np.zeros((60, 60))
    values[:30] = 1.0
    mask = values > 0 if with_mask else None
    sheet = draw_panels(image, values, mask, (0.0, 1.0), "bottle/good/000")
    panels = 3 if with_mask else 2
    assert sheet.shape[1] == panels * 240 + (panels - 1) * 4
    top = sheet.shape[0] - 240
    assert (sheet[top + 10, 10] == 200).all()
    assert brightness(sheet[top + 10, 250]) > brightness(sheet[top + 230, 250]) + 50
    if with_mask:
        assert (sheet[top + 10, 500] == 255).all()
        assert (sheet[top + 230, 500] == 0).all()


def test_a_warning_is_red_and_a_long_caption_is_cut() -> None:
    image, values = np.zeros((240, 240, 3), dtype=np.uint8), np.zeros((240, 240))
    plain = draw_panels(image, values, None, (0.0, 1.0), "x" * 500)
    warned = draw_panels(image, values, None, (0.0, 1.0), "x" * 500, "RANDOM WEIGHTS")
    assert plain.shape[1] == warned.shape[1]
    extra = warned.shape[0] - plain.shape[0]
    assert extra > 0
    strip = warned[plain.shape[0] - 240 : plain.shape[0] - 240 + extra].astype(int)
    assert ((strip[..., 0] - strip[..., 1]) > 100).any()
