"""Photographs with the contours of the pixels above the map threshold."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_clip.drawing.draw import Colour
from anomaly_clip.maps import resize_maps

__all__ = ["CONTOUR", "OUTLINE", "overlay"]

CONTOUR: Colour = (0, 255, 255)
"""Colour of the contour, rare on products and on tissue; bright, for dark photographs."""
OUTLINE: Colour = (0, 0, 0)
"""Colour of the line on both sides of the contour, for light photographs."""
SIDE_PER_PIXEL = 320
"""Longest side of an image, in pixels, for each pixel of the contour's width."""


def overlay(
    image: NDArray[np.uint8], anomaly_map: NDArray[np.floating], threshold: float
) -> NDArray[np.uint8]:
    """Draw the contours of the regions above a threshold.

    The contours follow the outermost pixels of the regions; a hole in a region has a contour, too.

    Args:
        image: RGB ``(H, W, 3)``; it is not changed.
        anomaly_map: ``(h, w)``; it is resized to the image.
        threshold: Pixels with a higher map value are inside.

    Returns:
        RGB ``(H, W, 3)``.
    """
    height, width = image.shape[:2]
    drawn = np.ascontiguousarray(image).copy()
    if anomaly_map.shape != (height, width):
        values = torch.from_numpy(np.ascontiguousarray(anomaly_map, dtype=np.float32))
        anomaly_map = resize_maps(values[None], (height, width))[0].numpy()
    inside = (anomaly_map > threshold).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(max(height, width) / SIDE_PER_PIXEL))
    outer = thickness + 2 * max(1, thickness // 2)
    cv2.drawContours(drawn, contours, -1, OUTLINE, outer)
    cv2.drawContours(drawn, contours, -1, CONTOUR, thickness)
    return drawn
