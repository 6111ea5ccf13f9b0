"""Noise images and masks of several shapes for tests of synthetic defects."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def shapes(rng: np.random.Generator, height: int, width: int, kind: int) -> NDArray[np.bool_]:
    """Return a full, an elliptic or a ragged mask."""
    if kind == 0:
        return np.ones((height, width), bool)
    if kind == 1:
        mask = np.zeros((height, width), np.uint8)
        axes = (max(1, width * 2 // 5), max(1, height // 3))
        cv2.ellipse(mask, (width // 2, height // 2), axes, 20, 0, 360, 1, -1)
        return mask.astype(bool)
    smooth = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 3)
    return np.asarray(smooth > 0)
