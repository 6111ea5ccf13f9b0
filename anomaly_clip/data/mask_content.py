"""Content of images that may be masks: black and white, or a photograph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.images import read_image

__all__ = [
    "has_white",
    "looks_like_a_mask",
    "looks_like_a_photograph",
    "looks_nearly_like_a_mask",
]

EXTREME = 8  # grey levels from black or white that still count as black or white
BLACK_AND_WHITE = 0.99  # fraction of such pixels in a mask, whose edges may be antialiased
NEARLY_EXTREME = 32  # the same for masks saved as JPEG, in folders with a name of masks
NEARLY_BLACK_AND_WHITE = 0.9
PHOTOGRAPH = 0.5  # fraction of such pixels below which an image is a photograph
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
    """Return whether some pixel of an image is white; False if unreadable."""
    pixels = _pixels(image)
    return pixels is not None and bool((pixels >= 255 - EXTREME).any())


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
