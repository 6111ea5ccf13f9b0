from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.filters import median as plain_median
from skimage.morphology import disk as plain_disk
from synthesis_images import noise_image

from anomaly_clip.synthesis.nsa_labels import disk, label_of, median_over_disk


def plain_label(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_], kind: str
) -> NDArray[np.float64]:
    """Return the label as the authors' code computes it, over the whole image."""
    inside = mask[..., None].astype(float)
    change = np.abs(inside * before - inside * after)
    changed = cv2.medianBlur((change.mean(axis=2) > 1).astype(np.uint8), 5)
    if kind == "binary":
        return changed.astype(float)
    level = changed[..., None].astype(float)
    intensity = plain_median(np.abs(level * before - level * after).mean(axis=2), plain_disk(5))
    if kind == "intensity":
        return intensity
    return changed / (1 + np.exp(-1 / 6 * (intensity - 20)))


@pytest.mark.parametrize("kind", ["binary", "intensity", "logistic-intensity"])
def test_labels_equal_plain_ones_bit_for_bit(kind: Any) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        before = noise_image(rng, 90, 110, 1)
        after, mask = before.copy(), np.zeros((90, 110), bool)
        for _ in range(3):
            height, width = rng.integers(5, 50, 2)
            top, left = rng.integers(0, 90 - height), rng.integers(0, 110 - width)
            box = np.s_[0 if seed % 2 else top : top + height, left : left + width]
            change = rng.normal(0, rng.choice([2, 30]), after[box].shape[:2])[..., None]
            after[box] = np.clip(after[box] + change, 0, 255)
            mask[box] = True
        ours = label_of(before, after, mask, kind)
        assert np.array_equal(ours, plain_label(before, after, mask, kind).astype(np.float32))


def test_the_median_over_a_disk_equals_scikit_image() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 700, (40, 33)).astype(np.uint16)
    values[rng.random(values.shape) < 0.4] = 0
    assert disk(5).sum() == 81
    plain = plain_median(values, plain_disk(5))
    assert np.array_equal(median_over_disk(values), plain)
    where = rng.random(values.shape) < 0.3
    assert np.array_equal(median_over_disk(values, where), np.where(where, plain, 0))
