"""Panels that show image, heat maps and mask side by side, under a caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.drawing.draw import ALARM, INK, Colour, font, write_lines
from anomaly_clip.files import printable

__all__ = ["PanelRow", "draw_panels", "heat_map", "map_lines", "stack_sheets"]

PANEL = 240
"""Minimum length of a panel's longer side in pixels; smaller images are enlarged."""
GAP = 4
LINE_HEIGHT = 16
ROWS = 256  # rows of a panel that are drawn at once


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
    maps = {**stages, name: anomaly_map}
    count = 1 + len(maps) + (mask is not None)
    row = PanelRow(image.shape[:2], count, map_lines(caption, list(maps), scale, warning))
    row.add(image)
    for values in maps.values():
        row.add_map(values, scale)
    if mask is not None:
        row.add_mask(mask)
    return np.asarray(row.sheet)


def map_lines(
    caption: str, names: Sequence[str], scale: tuple[float, float], warning: str | None
) -> list[tuple[str, Colour]]:
    """Return the lines of text above the panels of an image; see :func:`draw_panels`."""
    colours = f"{', '.join(names)} from {scale[0]:.4g} (dark) to {scale[1]:.4g} (bright)"
    lines = [(caption, INK), (colours, INK)]
    return [*lines, (warning, ALARM)] if warning else lines


class PanelRow:
    """A sheet with panels of equal size side by side, which are added one after the other.

    Besides the sheet, which takes four bytes per pixel, only a few rows of a panel are in memory.

    Args:
        size: Height and width of the images in pixels; small ones are enlarged.
        count: Number of panels.
        lines: Text and colour of each line above the panels.
    """

    def __init__(
        self, size: Sequence[int], count: int, lines: Sequence[tuple[str, Colour]]
    ) -> None:
        height, width = size
        enlarge = max(1.0, PANEL / max(height, width))
        self.panel = (round(width * enlarge), round(height * enlarge))
        """Width and height of a panel."""
        sheet_width = count * (self.panel[0] + GAP) - GAP
        room = sheet_width - 2 * GAP
        shortened = [(_shorten(printable(text), room), colour) for text, colour in lines]
        self._left = 0
        self._top = LINE_HEIGHT * len(lines) + GAP
        self.sheet = Image.new("RGB", (sheet_width, self._top + self.panel[1]), "white")
        """RGB image with the panels so far."""
        write_lines(self.sheet, shortened, LINE_HEIGHT, GAP)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add an image, RGB ``(H, W, 3)``."""
        self._add(image, lambda rows: rows)

    def add_map(self, values: NDArray[np.floating], scale: tuple[float, float]) -> None:
        """Add an anomaly map ``(h, w)`` as a heat map between two values."""
        self._add(values, lambda rows: heat_map(rows, *scale))

    def add_mask(self, mask: NDArray[np.bool_]) -> None:
        """Add a mask ``(h, w)``, white where it is True."""
        self._add(mask, _white, Image.Resampling.NEAREST)

    def _add(
        self,
        values: NDArray[Any],
        paint: Callable[[NDArray[Any]], NDArray[np.uint8]],
        kind: Image.Resampling = Image.Resampling.BILINEAR,
    ) -> None:
        if values.shape[1::-1] != self.panel:
            fitted = Image.fromarray(paint(values)).resize(self.panel, kind)
            self.sheet.paste(fitted, (self._left, self._top))
        else:
            for start in range(0, len(values), ROWS):
                rows = Image.fromarray(paint(values[start : start + ROWS]))
                self.sheet.paste(rows, (self._left, self._top + start))
        self._left += self.panel[0] + GAP


def _white(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)


def stack_sheets(sheets: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stack images of equal width below each other."""
    gap = np.full((GAP, sheets[0].shape[1], 3), 255, np.uint8)
    rows = [part for sheet in sheets for part in (sheet, gap)]
    return np.concatenate(rows[:-1])


def _shorten(text: str, width: int) -> str:
    """Cut off the start of a text that is too long; the end of a path is more informative."""
    length = font(LINE_HEIGHT - 4).getlength
    if length(text) <= width:
        return text
    while len(text) > 1 and length(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
