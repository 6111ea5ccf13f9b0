"""Where a defect can be seen: masks that leave out what was replaced by its like."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["tightened"]

VISIBLE = 10  # grey levels, the channel that differs most
CLOSING = 5  # side of the square that closes gaps
LEAST_PIXELS = 16


def tightened(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the part of a mask where the change can be seen; empty if that is next to nothing.

    Args:
        before: ``(H, W, 3)``.
        after: ``(H, W, 3)``.
        mask: ``(H, W)``, what a recipe acted on.
    """
    seen = (cv2.absdiff(before, after).max(axis=2) > VISIBLE) & mask
    kernel = np.ones((CLOSING, CLOSING), np.uint8)
    closed = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_CLOSE, kernel).astype(bool) & mask
    return closed if closed.sum() >= LEAST_PIXELS else np.zeros_like(mask)
