from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.synthesis.masks import foreground_of, tightened


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def test_an_invisible_change_is_left_out() -> None:
    before = np.full((40, 40, 3), 100, np.uint8)
    after, mask = before.copy(), np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    after[5:30, 5:30] = 105
    assert not tightened(before, after, mask).any()
    after[10:20, 10:20] = 200
    seen = tightened(before, after, mask)
    assert seen.sum() == 100
    assert seen[10:20, 10:20].all()
    after[:] = before
    after[6, 6:16] = 255  # ten pixels are too few
    assert not tightened(before, after, mask).any()


def test_the_foreground_of_an_object() -> None:
    rows, columns = np.mgrid[:100, :120]
    disc = (rows - 50) ** 2 + (columns - 60) ** 2 < 30**2
    noise = np.random.default_rng(0).normal(0, 4, (100, 120, 1))
    image = np.where(disc[..., None], [180, 60, 60], [90, 95, 90]) + noise
    mask = foreground_of(image.clip(0, 255).astype(np.uint8))
    overlap = (mask & disc).sum() / (mask | disc).sum()
    assert overlap > 0.9
    assert foreground_of(np.full((50, 50, 3), 80, np.uint8)).all()
