"""What an NSA defect is called, pixel by pixel: where and how much an image was changed.

All of it follows the published generator to the bit, but only looks where something was pasted: the
mean over three channels of a whole number is a third of a whole number, so medians are taken of
whole numbers, and only at pixels where they can be above zero and are asked for.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.synthesis.poisson import bounding_box

__all__ = ["LabelKind", "disk", "label_of", "median_over_disk"]

LabelKind = Literal["binary", "continuous", "intensity", "logistic-intensity"]

SPECKLES = 5  # side of the square whose median removes single pixels
RADIUS = 5  # of the disk whose median smooths intensities
AT_ONCE = 16384  # pixels whose disks are gathered, which bounds the memory


def label_of(
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    pasted: NDArray[np.bool_],
    kind: LabelKind,
    tolerance: float = 1.0,
    factor: float = 1.0,
    logistic: tuple[float, float] = (1 / 6, 20.0),
) -> NDArray[np.float32]:
    """Return how abnormal each pixel is called.

    Args:
        before: ``(H, W, 3)``.
        after: ``(H, W, 3)``.
        pasted: ``(H, W)``; nothing else counts as changed.
        kind: binary: 1 where it was changed; continuous: the factor there; intensity: by how many
            grey levels, smoothed, also a little around; logistic-intensity: a logistic function of
            that, where it was changed.
        tolerance: Grey levels, mean over the channels, that a change must be above.
        factor: See ``kind``.
        logistic: Steepness and the intensity at which the label is one half.

    Returns:
        ``(H, W)``; in ``[0, 1]`` but for kind intensity.
    """
    label = np.zeros(pasted.shape, np.float32)
    box = bounding_box(pasted)
    if box is None:
        return label
    box = _grown(box, RADIUS + SPECKLES // 2 + 1, pasted.shape)
    one, other, inside = before[box], after[box], pasted[box]
    total = cv2.absdiff(one, other).sum(axis=2, dtype=np.uint16) * inside
    changed = (total / 3 > tolerance).astype(np.uint8)
    changed = cv2.medianBlur(changed, SPECKLES)
    if kind == "binary":
        label[box] = changed
    elif kind == "continuous":
        label[box] = changed * np.float32(factor)
    else:
        total = total_where(one, other, changed)
        where = changed.astype(bool) if kind == "logistic-intensity" else None
        intensity = median_over_disk(total, where) / 3
        if kind == "logistic-intensity":
            steepness, middle = logistic
            label[box] = changed / (1 + np.exp(-steepness * (intensity - middle)))
        else:
            label[box] = intensity
    return label


def total_where(
    before: NDArray[np.uint8], after: NDArray[np.uint8], changed: NDArray[np.uint8]
) -> NDArray[np.uint16]:
    """Return the absolute difference summed over the channels where a pixel counts as changed."""
    total: NDArray[np.uint16] = cv2.absdiff(before, after).sum(axis=2, dtype=np.uint16) * changed
    return total


def median_over_disk(
    values: NDArray[np.uint16], where: NDArray[np.bool_] | None = None, radius: int = RADIUS
) -> NDArray[np.uint16]:
    """Return the median over a disk around each pixel; beyond the border its nearest pixel counts.

    Args:
        values: ``(H, W)``, 0 or more.
        where: Which pixels are asked for; the others are 0. Default: all.
        radius: 5 makes disks of 81 pixels.
    """
    around = disk(radius)
    half = int(around.sum()) // 2
    padded = np.pad(values, radius, mode="edge")
    # Only pixels with more than half of their disk above zero can have a median above zero.
    positive = (padded > 0).astype(np.float32)
    count = cv2.filter2D(positive, cv2.CV_32F, around.astype(np.float32))
    count = count[radius:-radius, radius:-radius]
    undecided = count > half
    if where is not None:
        undecided &= where
    result = np.zeros_like(values)
    down, right = np.nonzero(around)
    width, flat = padded.shape[1], padded.ravel()
    places = np.flatnonzero(undecided)
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        rows, columns = np.divmod(some, values.shape[1])
        gathered = flat[(rows * width + columns)[:, None] + (down * width + right)]
        gathered.partition(half, axis=1)
        result.ravel()[some] = gathered[:, half]
    return result


def disk(radius: int) -> NDArray[np.bool_]:
    """Return the pixels within a radius of the middle one, ``(2 r + 1, 2 r + 1)``."""
    line = np.arange(-radius, radius + 1)
    return line[:, None] ** 2 + line**2 <= radius**2


def _grown(box: tuple[slice, slice], by: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    rows, columns = (
        slice(max(0, part.start - by), min(size, part.stop + by))
        for part, size in zip(box, shape, strict=False)
    )
    return rows, columns
