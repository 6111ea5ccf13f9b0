"""Photographs with heat maps, outlines of masks, and contours at the map threshold."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_clip.drawing.draw import Colour
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.maps import resize_maps

__all__ = ["CONTOUR", "MASK_LINE", "OUTLINE", "blend", "overlay"]

CONTOUR: Colour = (0, 255, 255)
"""Colour of the contour, rare on products and on tissue; bright, for dark photographs."""
MASK_LINE: Colour = (255, 255, 255)
"""Colour of the outline of a mask, next to the colours of heat maps."""
OUTLINE: Colour = (0, 0, 0)
"""Colour of the line on both sides of the contour, for light photographs."""
OPACITY = 0.75
"""Opacity of a heat map on the photograph at the upper end of its scale; 0 at the lower end."""
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
    values = _resized(anomaly_map, image.shape[:2])
    return _draw_outline(image, values > threshold, CONTOUR)


def blend(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    scale: tuple[float, float],
    mask: NDArray[np.bool_] | None = None,
    threshold: float | None = None,
) -> NDArray[np.uint8]:
    """Blend a heat map over an image, with the outline of the mask.

    The opacity grows with the square of the value: the image is unchanged at the lower end of the
    scale, and the highest values stand out.

    Args:
        image: RGB ``(H, W, 3)``; it is not changed.
        anomaly_map: ``(h, w)``; it is resized to the image.
        scale: Map values at the lower and the upper end of the colour scale.
        mask: ``(H, W)``, whose outline is drawn; None: no mask.
        threshold: Map value whose contour is drawn; None: no contour.

    Returns:
        RGB ``(H, W, 3)``.
    """
    values = _resized(anomaly_map, image.shape[:2])
    low, high = scale
    share = ((values - low) / (high - low if high > low else 1.0)).clip(0, 1)
    opacity = (OPACITY * share**2)[..., None]
    mixed = (1 - opacity) * image + opacity * heat_map(values, low, high)
    drawn = mixed.round().astype(np.uint8)
    if threshold is not None:
        drawn = _draw_outline(drawn, values > threshold, CONTOUR)
    return drawn if mask is None else _draw_outline(drawn, mask, MASK_LINE)


def _resized(anomaly_map: NDArray[np.floating], size: tuple[int, ...]) -> NDArray[np.floating]:
    height, width = size
    if anomaly_map.shape == (height, width):
        return anomaly_map
    values = torch.from_numpy(np.ascontiguousarray(anomaly_map, dtype=np.float32))
    resized: NDArray[np.floating] = resize_maps(values[None], (height, width))[0].numpy()
    return resized


def _draw_outline(
    image: NDArray[np.uint8], inside: NDArray[np.bool_], colour: Colour
) -> NDArray[np.uint8]:
    """Draw the outermost pixels of regions, between two lines of `OUTLINE`."""
    drawn = np.ascontiguousarray(image).copy()
    regions = np.ascontiguousarray(inside).astype(np.uint8)
    contours, _ = cv2.findContours(regions, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(max(image.shape[:2]) / SIDE_PER_PIXEL))
    outer = thickness + 2 * max(1, thickness // 2)
    cv2.drawContours(drawn, contours, -1, OUTLINE, outer)
    cv2.drawContours(drawn, contours, -1, colour, thickness)
    return drawn
