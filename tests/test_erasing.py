from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.synthesis.presets import preset


def picture(rng: np.random.Generator, height: int, width: int, sigma: float) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def test_cells_of_one_group() -> None:
    """TAB's: 14 x 14 cells of 16 pixels, 4 of them black."""
    white = np.full((224, 224, 3), 255, np.uint8)
    make = preset("erasing", "tab_mask")
    for seed in range(5):
        made = make(white, np.random.default_rng(seed))
        cells = made.mask.reshape(14, 16, 14, 16).mean(axis=(1, 3))
        assert set(np.unique(cells)) <= {0.0, 1.0}
        assert 3 <= cells.sum() <= 4  # the padded list may hold a cell twice
        assert (made.image[made.mask] == 0).all()
