from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.drawing.overlay import CONTOUR, OUTLINE, overlay


def square(side: int = 100) -> np.ndarray:
    values = np.zeros((side, side), np.float32)
    values[side // 4 : -side // 4, side // 4 : -side // 4] = 2.0
    return values


def has_colour(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (image == colour).all(axis=-1)


@pytest.mark.parametrize("grey", [0, 90, 255])
def test_the_contour_lies_on_the_border_of_the_region(grey: int) -> None:
    image = np.full((100, 100, 3), grey, np.uint8)
    drawn = overlay(image, square(), 1.0)
    line = has_colour(drawn, CONTOUR)
    assert line[25, 25:75].all()  # the first row that is above the threshold
    assert line[25:75, 74].all()
    changed = (drawn != image).any(axis=-1)
    assert not changed[40:60, 40:60].any()  # the inside stays visible
    assert not changed[:20].any()
    assert (image == grey).all()  # the argument is not drawn upon


@pytest.mark.parametrize("grey", [0, 127, 255])
def test_the_contour_stands_out_on_photographs_of_any_brightness(grey: int) -> None:
    drawn = overlay(np.full((640, 480, 3), grey, np.uint8), square(64), 1.0)
    differences = np.abs(drawn.astype(int) - grey).sum(axis=-1)
    line = has_colour(drawn, CONTOUR)
    outline = has_colour(drawn, OUTLINE) & (grey > 0)
    assert line.any()
    assert differences[line | outline].max() > 380  # of 765


@pytest.mark.parametrize(("side", "width"), [(64, 1), (320, 1), (960, 3), (3200, 10)])
def test_the_contour_is_as_wide_as_the_image_is_large(side: int, width: int) -> None:
    drawn = overlay(np.zeros((side, side, 3), np.uint8), square(side), 1.0)
    column = has_colour(drawn, CONTOUR)[: side // 2, side // 2]
    assert abs(int(column.sum()) - width) <= 2


def test_a_map_is_resized_and_the_threshold_itself_is_outside() -> None:
    image = np.full((90, 120, 3), 200, np.uint8)
    assert has_colour(overlay(image, square(30), 1.0), CONTOUR).any()
    assert (overlay(image, square(30), 2.0) == image).all()
    assert (overlay(image, square(30), float("inf")) == image).all()


def test_holes_have_contours_and_everything_above_is_framed() -> None:
    image = np.full((100, 100, 3), 90, np.uint8)
    ring = square()
    ring[45:55, 45:55] = 0.0
    assert has_colour(overlay(image, ring, 1.0), CONTOUR)[44, 50]
    whole = has_colour(overlay(image, np.ones((100, 100)), 0.0), CONTOUR)
    assert whole[0].all()
    assert whole[:, -1].all()
    assert not whole[10:90, 10:90].any()


def test_arrays_that_are_not_contiguous() -> None:
    image = np.full((100, 100, 3), 90, np.uint8)
    turned, values = image[::-1, :, ::-1], square().T[::-1]
    assert (overlay(turned, values, 1.0) == overlay(turned.copy(), values.copy(), 1.0)).all()
