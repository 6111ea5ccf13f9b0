"""Gallery of the report page: small images with their heat maps and masks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.drawing.draw import grid
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.files import atomic_path, write_json
from anomaly_clip.progress import track
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.folder import GALLERY
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names
from anomaly_clip.results.selection import SelectedImage

__all__ = ["MAP_SIDE", "PANEL", "draw_gallery", "join_panels", "split_panels"]

PANEL = 192
"""Longest side of a panel in pixels."""
MAP_SIDE = PANEL // 2
"""Longest side of the maps stored for the gallery; heat maps are smooth enough to enlarge."""
GAP = 4
QUALITY = 82
WHITE = 255


def draw_gallery(
    folder: Path,
    data: AnomalyData,
    maps: MapStore,
    ranges: Ranges,
    rows: Rows,
    selected: Sequence[SelectedImage],
    has_full_size: bool,
) -> list[UnreadableImage]:
    """Draw the selected images into ``gallery/`` in a run's folder.

    Args:
        folder: The run's folder.
        data: Data set of the images.
        maps: Anomaly maps of the images; an image without a map is left out.
        ranges: Lowest and highest map value by category, the scale of the heat maps.
        rows: Label and score of each image.
        selected: Images to draw, in their order on the page.
        has_full_size: Whether ``maps/`` contains full-size drawings of all images.

    Returns:
        The images that can no longer be read, which are not drawn.
    """
    samples, dataset = data.samples("test"), data.dataset("test")
    names = image_names(samples)
    entries: list[dict[str, Any]] = []
    lost = []
    for index, kind, gap in track(selected, "drawing the gallery"):
        if index not in maps:
            continue
        try:
            item, row = dataset[index], rows[index]
        except UnreadableError as error:
            lost.append(error.described(index, samples[index]))
            continue
        file = f"{names[index]}.webp"
        panels = join_panels(
            item["image"].permute(1, 2, 0).numpy(),
            maps.load(index)["map"],
            ranges[row["category"]],
            item["mask"].numpy() if "mask" in item else None,
        )
        with atomic_path(folder / GALLERY / file) as temporary:
            Image.fromarray(panels).save(temporary, quality=QUALITY)
        entries.append(
            {
                "picture": file,
                "name": names[index],
                "kind": kind,
                "category": row["category"],
                "label": row["label"],
                "score": row["image_score"],
                "gap": gap,
                "full": has_full_size,
                "mask": "mask" in item,
            }
        )
    if entries:
        write_json(folder / GALLERY / f"{GALLERY}.json", {"pictures": entries})
    return lost


def join_panels(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    scale: Sequence[float],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.uint8]:
    """Place image, heat map and, if given, mask side by side.

    Args:
        image: RGB ``(H, W, 3)``.
        anomaly_map: ``(h, w)``.
        scale: Map values at the lower and the upper end of the colour scale.
        mask: ``(h, w)`` or None.

    Returns:
        RGB image; the longer side of each panel is `PANEL` pixels.
    """
    height, width = image.shape[:2]
    shrink = PANEL / max(height, width)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    low, high = scale
    panels = [image, heat_map(anomaly_map, low, high)]
    if mask is not None:
        panels.append(np.repeat(mask[..., None].astype(np.uint8) * WHITE, 3, axis=2))
    fitted = [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR) for p in panels]
    return np.asarray(grid(fitted, len(fitted), GAP))


def split_panels(sheet: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """Split an image from :func:`join_panels` into its panels."""
    width = (sheet.shape[1] + GAP) // count - GAP
    return [sheet[:, start : start + width] for start in range(0, sheet.shape[1], width + GAP)]
