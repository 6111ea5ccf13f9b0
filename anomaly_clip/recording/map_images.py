"""Drawings of all anomaly maps of a run, one file per image, in the folder ``maps``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.drawing.draw import save_drawing
from anomaly_clip.drawing.overlay import overlay
from anomaly_clip.drawing.panels import PanelRow, map_lines
from anomaly_clip.files import atomic_path
from anomaly_clip.masks import solid
from anomaly_clip.progress import track
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names, resize_map

__all__ = ["draw_map_images"]

BILINEAR = Image.Resampling.BILINEAR
MAX_DRAWN = 25_000_000
"""Largest number of pixels of a drawn image; larger images are drawn smaller."""


def draw_map_images(
    folder: Path,
    data: AnomalyData,
    maps: MapStore,
    ranges: Ranges,
    rows: Rows,
    own_size: bool,
    warning: str | None,
    thresholds: Mapping[str, float] = {},
) -> list[UnreadableImage]:
    """Draw each image whose maps were stored, with its maps and mask, in a file per image.

    Args:
        folder: Destination of ``category/defect/name.png``.
        data: Data set of the images.
        maps: Anomaly maps of the images.
        ranges: Lowest and highest map value by category, the scale of the heat maps.
        rows: Label and score of each image.
        own_size: Whether to draw images at their original size instead of the method's size; images
            of more than ``MAX_DRAWN`` pixels are drawn smaller.
        warning: Warning to draw in red, one line; None: no warning.
        thresholds: Map threshold by category. Where there is one, the contours of the pixels above
            it are drawn on a second panel of the image.

    Returns:
        The images that can no longer be read, which are not drawn.
    """
    samples = data.samples("test")
    dataset, read, names = data.dataset("test"), data.reader(), image_names(samples)
    lost = []
    for index in track(maps.indices, "drawing maps"):
        sample, row = samples[index], rows[index]
        small = maps.load(index)
        try:
            if own_size:
                with dataset.guard(sample):
                    image, full_mask = read(sample)
                mask = None if full_mask is None else solid(full_mask)
                image, mask = _shrink(image, mask)
                size = (image.shape[0], image.shape[1])
            else:
                item = dataset[index]
                image = item["image"].permute(1, 2, 0).numpy()
                mask = item["mask"].numpy() if "mask" in item else None
                size = small["map"].shape
        except UnreadableError as error:
            lost.append(error.described(index, sample))
            continue
        state = {0: "normal", 1: "anomalous", None: ""}[row["label"]]
        low, high = ranges[sample.category]
        if state and "decision" in row:
            state = f"labelled {state}"
        caption = f"{names[index]}   {state}   score {row['image_score']:.4g}"
        if "decision" in row:
            caption += f"   p-value {row['p_value']:.3g}   decision: {row['decision']}"
        # The final map is stored first, and drawn last.
        named = dict(sorted(small.items(), key=lambda entry: entry[0] == "map"))
        lines = map_lines(caption, list(named), (low, high), warning)
        threshold = thresholds.get(sample.category)
        count = 1 + (threshold is not None) + len(named) + (mask is not None)
        panels = PanelRow(image.shape[:2], count, lines)
        panels.add(image)
        if threshold is not None:
            # Of a small image, the contours are drawn after it is enlarged to the panel.
            fitted = np.asarray(Image.fromarray(image).resize(panels.panel, BILINEAR))
            panels.add(overlay(fitted, small["map"], threshold))
            del fitted
        del image  # one panel at a time: images may have hundreds of millions of pixels
        for values in named.values():
            panels.add_map(resize_map(values, size), (low, high))
        if mask is not None:
            panels.add_mask(mask)
        with atomic_path(folder / f"{names[index]}.png") as temporary:
            save_drawing(panels.sheet, temporary)
    return lost


def _shrink(
    image: NDArray[np.uint8], mask: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Shrink an image of more than ``MAX_DRAWN`` pixels, and its mask."""
    height, width = image.shape[:2]
    shrink = (MAX_DRAWN / (height * width)) ** 0.5
    if shrink >= 1:
        return image, mask
    size = (max(1, int(width * shrink)), max(1, int(height * shrink)))
    smaller = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return smaller, mask
