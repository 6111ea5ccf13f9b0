from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.synthesis.cutpaste import CutPaste, jittered


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def test_a_cut_patch_is_a_piece_of_the_image() -> None:
    image = noise_image(np.random.default_rng(0), 64, 64, 0)
    for seed in range(10):
        result = CutPaste("patch", jitter=0.0, tighten=False)(image, np.random.default_rng(seed))
        rows, columns = np.nonzero(result.mask)
        piece = result.image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        share = result.mask.mean()
        assert 0.015 < share < 0.16
        height, width = piece.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(image, (height, width, 3))
        assert (windows == piece).all(axis=(-3, -2, -1)).any()


def test_jitter_keeps_within_its_bounds() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = {int(jittered(grey, 0.1, np.random.default_rng(s))[0, 0, 0]) for s in range(30)}
    assert min(levels) >= 89
    assert max(levels) <= 111
    assert len(levels) > 5
    assert np.array_equal(jittered(grey, 0.0, np.random.default_rng(0)), grey)


def test_a_patch_is_not_pasted_onto_itself() -> None:
    """All pixels of the image differ, so the content of a patch shows its origin."""
    rows, columns = np.indices((64, 64), dtype=np.uint8)
    image = np.dstack([rows, columns, np.full_like(rows, 200)])
    for seed in range(100):
        result = CutPaste("patch", jitter=0.0, tighten=False)(image, np.random.default_rng(seed))
        pasted = np.argwhere(result.mask)
        origin = {tuple(pixel) for pixel in result.image[result.mask][:, :2].tolist()}
        place = {tuple(pixel) for pixel in pasted.tolist()}
        assert len(origin) == len(place)
        assert len(origin & place) / len(origin | place) <= 0.5, seed
