"""Per-pixel labels of NSA defects: where an image changed, and by how much.

The labels equal those of the published generator bit for bit, but are computed only where something
was pasted. Medians are taken of the integer sums over three channels and then divided by three.
They are computed only at requested pixels where the median can be above zero.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.synthesis.poisson import bounding_box

__all__ = ["LabelKind", "disk", "label_of", "median_over_disk"]

LabelKind = Literal["binary", "continuous", "intensity", "logistic-intensity"]

SPECKLES = 5  # side of the median filter that removes single pixels
RADIUS = 5  # radius of the disk of the median that smooths intensities
AT_ONCE = 16384  # largest number of disks gathered at once, to limit memory


def label_of(
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    pasted: NDArray[np.bool_],
    kind: LabelKind,
    tolerance: float = 1.0,
    factor: float = 1.0,
    logistic: tuple[float, float] = (1 / 6, 20.0),
) -> NDArray[np.float32]:
    """Return the label of each pixel.

    Args:
        before: Original image, ``(H, W, 3)``.
        after: Image with pasted patches, ``(H, W, 3)``.
        pasted: ``(H, W)``, pasted pixels; all other pixels count as unchanged.
        kind: binary: 1 at changed pixels; continuous: ``factor`` at changed pixels; intensity:
            smoothed change in grey levels, positive slightly beyond the changed pixels;
            logistic-intensity: a logistic function of the intensity at changed pixels.
        tolerance: A pixel counts as changed if its difference, averaged over the channels, exceeds
            this many grey levels.
        factor: Label of changed pixels for kind continuous.
        logistic: Steepness, and the intensity at which the label is 1/2.

    Returns:
        ``(H, W)``, in ``[0, 1]`` except for kind intensity.
    """
    label = np.zeros(pasted.shape, np.float32)
    box = bounding_box(pasted)
    if box is None:
        return label
    box = _grown(box, RADIUS + SPECKLES // 2 + 1, pasted.shape)
    old, new, inside = before[box], after[box], pasted[box]
    total = cv2.absdiff(old, new).sum(axis=2, dtype=np.uint16) * inside
    changed = (total / 3 > tolerance).astype(np.uint8)
    changed = cv2.medianBlur(changed, SPECKLES)
    if kind == "binary":
        label[box] = changed
    elif kind == "continuous":
        label[box] = changed * np.float32(factor)
    else:
        total = total_where(old, new, changed)
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
    """Return the absolute difference summed over the channels, at changed pixels only."""
    total: NDArray[np.uint16] = cv2.absdiff(before, after).sum(axis=2, dtype=np.uint16) * changed
    return total


def median_over_disk(
    values: NDArray[np.uint16], where: NDArray[np.bool_] | None = None, radius: int = RADIUS
) -> NDArray[np.uint16]:
    """Return the median over a disk around each pixel; the image is padded with its edge pixels.

    Args:
        values: ``(H, W)``, 0 or more.
        where: Pixels to compute; the others are 0. Default: all.
        radius: Radius of the disk; 5 gives 81 pixels.
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
    """Return the mask of pixels within a radius of the central one, ``(2 r + 1, 2 r + 1)``."""
    line = np.arange(-radius, radius + 1)
    return line[:, None] ** 2 + line**2 <= radius**2


def _grown(box: tuple[slice, slice], by: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    rows, columns = (
        slice(max(0, part.start - by), min(size, part.stop + by))
        for part, size in zip(box, shape, strict=False)
    )
    return rows, columns
