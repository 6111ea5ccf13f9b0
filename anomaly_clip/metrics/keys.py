"""Keys of scores, which are integers in the order of the scores, and pixel histograms by key.

A 16-bit key is the bit pattern of the score in half precision, so half-precision scores lose
nothing. Patterns of negative scores are in reverse order; `key_order` corrects this once when
metrics are computed, not for every pixel. A fine key has 20 bits of the score in single precision.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_clip.metrics.pro import region_weights

__all__ = [
    "BFLOAT16",
    "CHUNK",
    "DEVICE_CHUNK",
    "FINE",
    "FLOAT16",
    "KEY_KINDS",
    "count_keys",
    "count_with_opencv",
    "defect_weights",
    "key_edges",
    "key_order",
    "key_values",
    "score_keys",
    "with_one_zero",
]

CHUNK = 1 << 22
"""Number of pixels converted at once; `cv2.calcHist` counts in float32, exact up to 2^24."""

DEVICE_CHUNK = 1 << 25
"""Number of pixels converted at once on a GPU, where kernel launches cost more than the memory of
temporary keys (12 bytes per pixel)."""

KEY_KINDS = FLOAT16, BFLOAT16, FINE = 1, 2, 3
"""Kinds of key."""
FINE_EXPONENTS = (-44, 19)
"""Binary exponents that a fine key distinguishes; smaller scores tie with 0, larger ones with each
other."""
FINE_DIGITS = 13
"""Bits of the mantissa in a fine key."""

Histograms = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""Counts of all pixels and of anomalous pixels, and sums of region weights; the last two are None
if no mask has a defect."""


def count_keys(maps: Tensor, masks: Tensor, kind: int, num_keys: int) -> Histograms:
    """Count pixels by key on any device."""
    keys = score_keys(maps, kind)
    counts = torch.bincount(keys.flatten(), minlength=num_keys)
    # Only masks with a defect go to the CPU, where regions are labelled.
    with_defect = masks.flatten(1).any(dim=1).nonzero().squeeze(1)  # (images,)
    if not len(with_defect):
        return counts, None, None
    keys, masks = keys[with_defect.to(keys.device)], masks[with_defect]
    weights = defect_weights(masks.cpu().numpy())
    assert weights is not None
    # Defects have few pixels. On the CPU, the order of their weighted sum does not vary.
    hit = keys[masks.to(keys.device)].cpu()  # (pixels of defects,)
    positives = torch.bincount(hit, minlength=num_keys)
    return counts, positives, torch.bincount(hit, torch.from_numpy(weights), minlength=num_keys)


def count_with_opencv(maps: Tensor, masks: Tensor, kind: int, num_keys: int) -> Histograms:
    """Count pixels by key on the CPU; OpenCV's histogram is several times faster than torch's."""
    half = maps.to(torch.bfloat16 if kind == BFLOAT16 else torch.float16)
    keys = half.contiguous().view(torch.int16).numpy().view(np.uint16)
    counts = torch.zeros(num_keys, dtype=torch.int64)
    flat = keys.reshape(1, -1)  # (1, pixels), the shape that calcHist expects
    for start in range(0, flat.shape[1], CHUNK):
        part = flat[:, start : start + CHUNK]
        histogram = cv2.calcHist([part], [0], None, [num_keys], [0, num_keys])
        counts += torch.from_numpy(histogram.ravel()).long()
    mask = masks.numpy()
    weights = defect_weights(mask)
    if weights is None:
        return counts, None, None
    hit = np.concatenate([k[m] for k, m in zip(keys, mask, strict=True) if m.any()])
    positives = np.bincount(hit, minlength=num_keys)
    regions = np.bincount(hit, weights, minlength=num_keys)
    return counts, torch.from_numpy(positives), torch.from_numpy(regions)


def defect_weights(masks: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return the region weights of all defect pixels of masks, in order; None if there are none."""
    weights = np.concatenate([np.zeros(0), *(region_weights(mask) for mask in masks)])
    return weights if len(weights) else None


def score_keys(maps: Tensor, kind: int) -> Tensor:
    """Return the keys of scores, int32."""
    if kind == FINE:
        lowest, _ = FINE_EXPONENTS
        scores = maps.float() + 0.0  # merges both zeros
        patterns = scores.view(torch.int32) & 0x7FFFFFFF
        digits = (patterns >> (23 - FINE_DIGITS)) - ((127 + lowest) << FINE_DIGITS)
        half = 1 << 19
        size = digits.clamp(0, half - 1)
        return torch.where(scores < 0, half - 1 - size, half + size)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float16
    return maps.to(dtype).contiguous().view(torch.int16).int() & 0xFFFF


def key_order(num_keys: int) -> NDArray[np.int64]:
    """Return all keys from the lowest score to the highest."""
    if num_keys > 1 << 16:
        return np.arange(num_keys)
    return np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)])


def with_one_zero(histogram: np.ndarray, fine: bool) -> np.ndarray:
    """Add the counts of minus zero, including negative scores rounded to it, to the key of zero."""
    if fine:
        return histogram
    folded = histogram.copy()
    folded[0] += folded[0x8000]
    folded[0x8000] = 0
    return folded


def key_values(keys: NDArray[np.int64], kind: int) -> NDArray[np.float64]:
    """Return the scores that keys represent, in half precision for 16-bit keys."""
    if kind == FINE:
        low, high = key_edges(keys, kind)  # digits beyond those of a key are cut off
        nearest: NDArray[np.float64] = np.where(keys < 1 << 19, high, low)
        return nearest
    if kind == BFLOAT16:
        return (keys.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return keys.astype(np.uint16).view(np.float16).astype(np.float64)


def key_edges(keys: NDArray[np.int64], kind: int) -> NDArray[np.float64]:
    """Return the lowest and the highest float32 score of each key, ``(2, n)``."""
    if kind == FINE:
        lowest, _ = FINE_EXPONENTS
        half = 1 << 19
        negative = keys < half
        size = np.where(negative, half - 1 - keys, keys - half)

        def value(size: NDArray[np.int64]) -> NDArray[np.float64]:
            patterns = (size + ((127 + lowest) << FINE_DIGITS)) << (23 - FINE_DIGITS)
            scores = patterns.astype(np.uint32).view(np.float32).astype(np.float64)
            return np.where(size == 0, 0.0, np.where(size == half, np.inf, scores))

        near, far = value(size), value(size + 1)
        return np.where(negative, np.stack([-far, -near]), np.stack([near, far]))
    values = keys.astype(np.uint16).view(np.float16)
    infinity = np.float16(np.inf)
    with np.errstate(over="ignore"):
        around = np.stack([np.nextafter(values, -infinity), np.nextafter(values, infinity)])
    # Scores are rounded to the nearest value, as if 65536 came after the largest float16.
    finite = np.clip(np.stack([around, np.stack([values] * 2)]).astype(np.float64), -65536, 65536)
    edges: NDArray[np.float64] = finite.mean(axis=0)
    edges[0, values == -infinity] = -np.inf
    edges[1, values == infinity] = np.inf
    return edges
