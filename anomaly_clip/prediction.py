"""The result of a detector for one image: score, decision, map and drawings."""

from __future__ import annotations

import base64
import html
import importlib
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageShow

from anomaly_clip.data.transforms import Resize
from anomaly_clip.decisions.calibration import ANOMALOUS
from anomaly_clip.drawing.overlay import overlay
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.files import printable
from anomaly_clip.image_inputs import ImageSource
from anomaly_clip.results.map_store import resize_map

__all__ = ["ImageMap", "Prediction"]

NOTEBOOK_SIDE = 800
"""Longest side of a drawing in a notebook, in pixels."""
SMALL_SIDE = 256
"""Longest side of the drawing in a table, in pixels."""
HEAT = 0.5
"""Share of the heat map in a drawing without a map threshold."""


@dataclass(frozen=True, eq=False)
class ImageMap:
    """Anomaly map of a square image, and where that was in the original image.

    Args:
        values: float32 ``(s, s)``.
        size: Height and width of the original image.
        resize: How the image was made square.
        side: Side of the square image, in pixels.
    """

    values: NDArray[np.float32]
    size: tuple[int, int]
    resize: Resize
    side: int

    def full(self) -> NDArray[np.float32]:
        """Return the map at the original size, NaN where a crop did not see the image."""
        height, width = self.size
        left, top, right, bottom = self.resize.seen(width, height, self.side)
        if (left, top, right, bottom) == (0, 0, width, height):
            return np.asarray(resize_map(self.values, self.size), dtype=np.float32)
        full = np.full(self.size, np.nan, dtype=np.float32)
        full[top:bottom, left:right] = resize_map(self.values, (bottom - top, right - left))
        return full


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Score, decision and anomaly map of one image.

    Args:
        score: Anomaly score, higher = more anomalous; with a calibration, the score that decides.
            NaN if the image could not be read.
        category: Category of the image.
        path: The image's file as given; None for an image in memory.
        p_value: Conformal p-value in (0, 1]; None without a calibration.
        decision: ``normal`` or ``anomalous``; None without a calibration.
        error: Why the image could not be read; None if it was.
        parts: Parts of the score by name, such as SDP's r0 and r1.
        map_threshold: Pixels with a higher map value are marked; None without a calibration.
        source: The image, for drawings.
        image_map: The anomaly map; None without one.
    """

    score: float
    category: str
    path: str | None = None
    p_value: float | None = None
    decision: str | None = None
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    map_threshold: float | None = None
    source: ImageSource | None = None
    image_map: ImageMap | None = None

    @property
    def map(self) -> NDArray[np.float32] | None:
        """Anomaly map, float32 ``(h, w)`` in the size of the image, higher = more anomalous.

        It is resized at every access, as the maps of many photographs would fill the memory. Pixels
        that a crop does not show are NaN. None if there is no map.
        """
        return None if self.image_map is None else self.image_map.full()

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Marked pixels, bool ``(h, w)`` in the size of the image; None without a map threshold.

        They do not decide: a normal image may have some.
        """
        full = self.map
        if full is None or self.map_threshold is None:
            return None
        return np.asarray(full > self.map_threshold)  # False where it is NaN

    def overlay(self, longest: int | None = None) -> Image.Image:
        """Return the image with the contours of the marked pixels, or with its heat map.

        The heat map is drawn without a map threshold. Its colours range from the lowest to the
        highest value of this image, so that they tell where, but not whether, it is anomalous.

        Args:
            longest: Longest side in pixels to which a larger image is shrunk; default: its own.

        Raises:
            FileNotFoundError: If the image's file does not exist any more.
            ValueError: If the image could not be read.
        """
        if self.source is None or self.error is not None:
            raise ValueError(f"{self.path}: there is no image to draw ({self.error})")
        image = Image.fromarray(self.source.read())
        if longest is not None and max(image.size) > longest:
            image.thumbnail((longest, longest))
        if self.image_map is None:
            return image
        pixels = np.asarray(image)
        values = replace(self.image_map, size=(image.height, image.width)).full()
        if self.map_threshold is not None:
            return Image.fromarray(overlay(pixels, values, self.map_threshold))
        seen = ~np.isnan(values)
        low, high = float(values[seen].min()), float(values[seen].max())
        heat = heat_map(np.where(seen, values, low), low, high)
        mixed = np.where(seen[..., None], (1 - HEAT) * pixels + HEAT * heat, pixels)
        return Image.fromarray(mixed.round().astype(np.uint8))

    def show(self) -> None:
        """Show :meth:`overlay` in a notebook, or in the viewer of the desktop.

        Raises:
            RuntimeError: If there is no viewer.
            ValueError: If the image could not be read.
        """
        drawing = self.overlay()
        if _in_notebook():
            importlib.import_module("IPython.display").display(drawing)
        elif not ImageShow.show(drawing, title=self._name):
            raise RuntimeError("no viewer of images was found: use overlay().save(FILE) instead")

    @property
    def _name(self) -> str:
        return "image" if self.path is None else PurePath(self.path).name

    def __repr__(self) -> str:
        """Return one line with name, decision and score."""
        return f"<Prediction of {printable(self._name)}: {printable(self._summary())}>"

    def _summary(self) -> str:
        if self.error is not None:
            return f"not read, {' '.join(self.error.split())}"
        parts = [] if self.decision is None else [self.decision]
        parts.append(f"score {self.score:.6g}")
        parts += [] if self.p_value is None else [f"p-value {self.p_value:.4g}"]
        return ", ".join(parts)

    def _repr_png_(self) -> bytes | None:
        """Return the drawing for a notebook; None if the image cannot be read, or not any more."""
        return self._png(NOTEBOOK_SIDE)

    def _png(self, longest: int) -> bytes | None:
        if self.error is not None:
            return None
        try:
            return _encoded(self.overlay(longest), "PNG")
        except (OSError, ValueError):
            return None

    def _repr_html_(self) -> str:
        """Return a small drawing and the result, for a notebook."""
        name, summary = html.escape(printable(self._name)), html.escape(printable(self._summary()))
        text = f"<b>{name}</b><br>{summary}"
        if self.decision == ANOMALOUS:
            text = f'<div style="border-left: 4px solid #be0000; padding-left: 6px">{text}</div>'
        image = self._png(SMALL_SIDE)
        if image is None:
            return f"<div>{text}</div>"
        drawing = base64.b64encode(image).decode()
        return f'<div><img alt="{name}" src="data:image/png;base64,{drawing}"><br>{text}</div>'


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _in_notebook() -> bool:
    """Return whether IPython shows images; nothing is imported if it does not run."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")
