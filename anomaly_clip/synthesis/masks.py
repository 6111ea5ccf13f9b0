"""Masks computed from pixels: the visible part of a defect, and the object in an image."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

__all__ = ["foreground_of", "tightened"]

VISIBLE = 10  # grey levels; a change is visible if a channel differs by more
CLOSING = 5  # side in pixels of the square that closes gaps
LEAST_PIXELS = 16  # smallest size of a visible defect

FRAME = 5  # width in pixels of the border frame, assumed to be background
OBJECT_CLOSING = 7  # side in pixels of the square that closes gaps
SHARES = (0.1, 0.9)  # fraction of the image; an estimate outside this range is discarded


def tightened(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the part of a mask with a visible change; empty if fewer than 16 pixels are left.

    Args:
        before: Normal image, ``(H, W, 3)``.
        after: Defective image, ``(H, W, 3)``.
        mask: ``(H, W)``, the pixels that a recipe pasted or filled.
    """
    seen = (cv2.absdiff(before, after).max(axis=2) > VISIBLE) & mask
    kernel = np.ones((CLOSING, CLOSING), np.uint8)
    closed = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_CLOSE, kernel).astype(bool) & mask
    return closed if closed.sum() >= LEAST_PIXELS else np.zeros_like(mask)


def foreground_of(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the pixels that differ from the colour of the border frame.

    The distance from the frame's median colour in Lab is thresholded by Otsu's method; gaps are
    closed and holes filled. If the result covers less than 10 % or more than 90 % of the image, all
    pixels are returned instead.

    Args:
        image: ``(H, W, 3)``, RGB.

    Returns:
        ``(H, W)``.
    """
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    edge = min(FRAME, min(image.shape[:2]) // 2)
    frame = np.ones(image.shape[:2], bool)
    frame[edge:-edge, edge:-edge] = False
    distance = np.linalg.norm(lab - np.median(lab[frame], axis=0), axis=2)
    scaled = (distance * (255 / max(float(distance.max()), 1e-6))).astype(np.uint8)
    _, bright = cv2.threshold(scaled, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    kernel = np.ones((OBJECT_CLOSING, OBJECT_CLOSING), np.uint8)
    filled = binary_fill_holes(cv2.morphologyEx(bright, cv2.MORPH_CLOSE, kernel))
    mask = np.asarray(filled, bool)
    low, high = SHARES
    return mask if low <= mask.mean() <= high else np.ones_like(mask)
