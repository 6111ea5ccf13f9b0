"""Content of images that may be masks: black and white, or a photograph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.images import read_image

__all__ = [
    "has_two_values",
    "has_white",
    "is_two_valued",
    "looks_like_a_mask",
    "looks_like_a_photograph",
    "looks_nearly_like_a_mask",
]

EXTREME = 8  # grey levels from black or white that still count as black or white
BLACK_AND_WHITE = 0.99  # fraction of such pixels in a mask, whose edges may be antialiased
NEARLY_EXTREME = 32  # the same for masks saved as JPEG, in folders with a name of masks
NEARLY_BLACK_AND_WHITE = 0.9
PHOTOGRAPH = 0.5  # fraction of such pixels below which an image is a photograph
NEARLY_TWO_VALUED = 0.95  # fraction of pixels near one of two levels, such as 0 and 128
CLUSTER = 6  # part of the distance of the two levels that counts as near
NUM_COLOURS = 32  # grey levels that a photograph has at least; masks of classes have fewer


def looks_like_a_mask(image: Path) -> bool:
    """Return whether nearly all pixels of an image are black or white; False if unreadable."""
    return _extreme_share(_pixels(image), EXTREME) >= BLACK_AND_WHITE


def looks_nearly_like_a_mask(image: Path) -> bool:
    """Return the same with the tolerance of masks that were saved as JPEG."""
    return _extreme_share(_pixels(image), NEARLY_EXTREME) >= NEARLY_BLACK_AND_WHITE


def looks_like_a_photograph(image: Path) -> bool:
    """Return whether an image has many grey levels; False if unreadable."""
    pixels = _pixels(image)
    if pixels is None or _extreme_share(pixels, NEARLY_EXTREME) >= PHOTOGRAPH:
        return False
    return len(np.unique(pixels[..., 1])) >= NUM_COLOURS


def has_white(image: Path) -> bool:
    """Return whether a pixel of a mask is white, or of its value if that is no white.

    False if unreadable.
    """
    pixels = _pixels(image)
    if pixels is None:
        return False
    bright = pixels >= 255 - EXTREME
    return bool(bright.any()) or (is_two_valued(image) and bool(pixels.any()))


def is_two_valued(image: Path) -> bool:
    """Return whether an image has the level 0 and at most one other; False if unreadable."""
    pixels = _pixels(image)
    if pixels is None or pixels.min() > 0 or (pixels != pixels[..., :1]).any():
        return False
    return len(np.unique(pixels[..., 0])) <= 2


def has_two_values(image: Path) -> bool:
    """Return whether an image is nearly of one or two grey levels; False if unreadable.

    Masks of any two values count, such as 0 and 1, and masks that were saved as JPEG.
    """
    pixels = _pixels(image)
    if pixels is None:
        return False
    middle = (int(pixels.min()) + int(pixels.max())) / 2
    low, high = pixels[pixels <= middle], pixels[pixels > middle]
    if not high.size:
        return True
    levels = float(np.median(low)), float(np.median(high))
    near = (levels[1] - levels[0]) / CLUSTER
    return float(_within(low, levels[0], near) + _within(high, levels[1], near)) >= (
        NEARLY_TWO_VALUED * pixels.size
    )


def _within(values: NDArray[np.uint8], level: float, distance: float) -> int:
    return int((np.abs(values.astype(np.float32) - level) <= distance).sum())


def _extreme_share(pixels: NDArray[np.uint8] | None, distance: int) -> float:
    """Return the fraction of values near black or white; 0 for an unreadable image."""
    if pixels is None:
        return 0.0
    return float(((pixels <= distance) | (pixels >= 255 - distance)).mean())


def _pixels(image: Path) -> NDArray[np.uint8] | None:
    """Return an image ``(H, W, 3)``; None if it is unreadable."""
    try:
        return read_image(image)
    except (OSError, ValueError):
        return None
