"""Panels that show image, heat maps and mask side by side, under a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.drawing.draw import ALARM, INK, add_caption, font, grid
from anomaly_clip.files import printable

__all__ = ["draw_panels", "heat_map", "stack_sheets"]

PANEL = 240
"""Minimum length of a panel's longer side in pixels; smaller images are enlarged."""
GAP = 4
LINE_HEIGHT = 16


def heat_map(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Colour a map ``(h, w)`` as RGB ``(h, w, 3)``, dark up to ``low`` and bright from ``high``."""
    width = high - low
    scaled = (values.astype(np.float32) - low) / (width if width > 0 else 1.0)
    grey = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def draw_panels(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    mask: NDArray[np.bool_] | None,
    scale: tuple[float, float],
    caption: str,
    warning: str | None = None,
    stages: Mapping[str, NDArray[np.floating]] = {},
    name: str = "map",
) -> NDArray[np.uint8]:
    """Place image, heat map and, if given, mask side by side under a caption.

    Args:
        image: RGB ``(H, W, 3)``.
        anomaly_map: ``(h, w)``.
        mask: ``(h, w)`` or None.
        scale: Map values of the darkest and the brightest colour. Use one scale for all images of a
            category, so that their heat maps can be compared.
        caption: One line about the image.
        warning: Another line, in red; None for no warning.
        stages: Further maps ``(h, w)`` by name. Their heat maps are placed between the image and
            the anomaly map, and use the same scale.
        name: Name of the anomaly map.

    Returns:
        RGB ``(H', W', 3)``.
    """
    height, width = image.shape[:2]
    enlarge = max(1.0, PANEL / max(height, width))
    size = (round(width * enlarge), round(height * enlarge))
    maps = [*stages.values(), anomaly_map]
    panels = [_fit(image, size), *(_fit(heat_map(values, *scale), size) for values in maps)]
    if mask is not None:
        white = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
        panels.append(_fit(white, size, Image.Resampling.NEAREST))
    names = printable(", ".join([*stages, name]))
    lines = [
        (printable(caption), INK),
        (f"{names} from {scale[0]:.4g} (dark) to {scale[1]:.4g} (bright)", INK),
    ]
    if warning:
        lines.append((printable(warning), ALARM))
    row = grid(panels, len(panels), GAP)
    shortened = [(_shorten(text, row.width - 2 * GAP), colour) for text, colour in lines]
    return np.asarray(add_caption(row, shortened, LINE_HEIGHT, GAP, below=GAP))


def stack_sheets(sheets: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stack images of equal width below each other."""
    gap = np.full((GAP, sheets[0].shape[1], 3), 255, np.uint8)
    rows = [part for sheet in sheets for part in (sheet, gap)]
    return np.concatenate(rows[:-1])


def _fit(
    array: NDArray[np.uint8],
    size: tuple[int, int],
    kind: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    return Image.fromarray(array).resize(size, kind)


def _shorten(text: str, width: int) -> str:
    """Cut off the start of a text that is too long; the end of a path is more informative."""
    length = font(LINE_HEIGHT - 4).getlength
    if length(text) <= width:
        return text
    while len(text) > 1 and length(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
