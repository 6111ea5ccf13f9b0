"""Which pixels of a picture show the object: a guess without any training (our choice)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

__all__ = ["foreground_of"]

FRAME = 5  # pixels at the border that are taken for background
CLOSING = 7  # side of the square that closes gaps
SHARES = (0.1, 0.9)  # of the picture; a guess outside is none


def foreground_of(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which pixels differ from the colour of the border frame; all if that says nothing.

    Distance from the frame's median colour in Lab, Otsu's threshold, gaps closed, holes filled; a
    guess of less than a tenth or more than nine tenths of the picture is dropped.

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
    _, found = cv2.threshold(scaled, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    kernel = np.ones((CLOSING, CLOSING), np.uint8)
    filled = binary_fill_holes(cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel))
    mask = np.asarray(filled, bool)
    low, high = SHARES
    return mask if low <= mask.mean() <= high else np.ones_like(mask)
