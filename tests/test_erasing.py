from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.presets import preset


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def test_cells_of_one_group() -> None:
    """TAB's setting: a 14 x 14 grid of 16-pixel cells, of which 3 or 4 are black."""
    white = np.full((224, 224, 3), 255, np.uint8)
    make = preset("erasing", "tab_mask")
    for seed in range(5):
        result = make(white, np.random.default_rng(seed))
        cells = result.mask.reshape(14, 16, 14, 16).mean(axis=(1, 3))
        assert set(np.unique(cells)) <= {0.0, 1.0}
        assert 3 <= cells.sum() <= 4  # a group may contain a cell twice
        assert (result.image[result.mask] == 0).all()


GREY = np.full((60, 80, 3), (40, 120, 200), np.uint8)


def test_rectangles_have_the_requested_size() -> None:
    """A single rectangle covers an eighth of the image and is twice as wide as high."""
    make = Erasing(count=(1, 1), area=(0.125, 0.125), aspect=(2.0, 2.0), fill="black")
    places = set()
    for seed in range(6):
        result = make(GREY, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(result.mask.any(1)), np.flatnonzero(result.mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        # sqrt(600 / 2) = 17.3 pixels high and sqrt(600 * 2) = 34.6 wide.
        assert (height, width) == (17, 35)
        assert result.mask.sum() == height * width
        places.add((rows[0], columns[0]))
    assert len(places) > 3


@pytest.mark.parametrize("fill", ["black", "mean", "colour", "noise", "any"])
def test_only_masked_pixels_are_filled(fill: Any) -> None:
    image = noise_image(np.random.default_rng(9), 60, 80, 2.0)
    before = image.copy()
    result = Erasing(fill=fill, tighten=False)(image, np.random.default_rng(1))
    assert np.array_equal(image, before)
    assert np.array_equal(result.image[~result.mask], image[~result.mask])
    filled = result.image[result.mask]
    if fill == "mean":
        assert (filled == np.rint(image.reshape(-1, 3).mean(0))).all()
    elif fill == "colour":
        assert len(np.unique(filled, axis=0)) == 1
    elif fill == "noise":
        assert len(np.unique(filled, axis=0)) > len(filled) // 2
    assert result.info["fill"] in ("black", "mean", "colour", "noise")
    assert np.array_equal(result.label, result.mask.astype(np.float32))


def test_an_invisible_change_is_no_defect() -> None:
    result = Erasing(fill="black")(np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0))
    assert result.info["failed"] == "no visible change"
    assert not result.mask.any()
    assert not result.image.any()


def test_centres_lie_on_the_foreground() -> None:
    foreground = np.zeros(GREY.shape[:2], bool)
    assert not Erasing(fill="black")(GREY, np.random.default_rng(0), None, foreground).mask.any()
    foreground[:, :40] = True
    make = Erasing(count=(1, 1), fill="black")
    for seed in range(8):
        columns = np.flatnonzero(
            make(GREY, np.random.default_rng(seed), None, foreground).mask.any(0)
        )
        if len(columns):  # empty if no attempt had its centre on the foreground
            assert columns[0] + (np.ptp(columns) + 1) // 2 < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": (0, 2)}, r"count \(0, 2\): expected 0 < smallest <= largest"),
        ({"aspect": (2.0, 1.0)}, "aspect .*expected 0 < smallest <= largest"),
        ({"area": (0.5, 1.5)}, "at most 1, the whole image"),
        ({"grid": 0}, "grid must be 1 or more"),
        ({"groups": 0}, "groups must be 1 or more"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Erasing(**options)
