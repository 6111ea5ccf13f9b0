"""The small pictures of a run's page: image, heat map and mask side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.files import atomic_path, write_json
from anomaly_clip.progress import track
from anomaly_clip.results.map_store import KeptMaps, Ranges, Rows, picture_names
from anomaly_clip.results.selection import Chosen

__all__ = ["GALLERY", "KEPT", "PANEL", "draw_gallery", "panels_of", "side_by_side"]

GALLERY = "gallery"
"""Folder of the pictures, and name of the ``.json`` in it that lists them."""
PANEL = 192
"""Longest side of one of the panels in pixels."""
KEPT = PANEL // 2
"""Longest side of the maps that are kept for them, one of every image: heat maps are smooth."""
GAP = 4
QUALITY = 82
WHITE = 255


def draw_gallery(
    folder: Path,
    data: AnomalyData,
    kept: KeptMaps,
    ranges: Ranges,
    rows: Rows,
    chosen: Sequence[Chosen],
    drawn: bool,
) -> None:
    """Draw chosen images into ``gallery/`` of a run's folder.

    Args:
        folder: The run's.
        data: The images.
        kept: Their maps; an image without one has no picture.
        ranges: The scale of each category's heat maps.
        rows: Label and score of each image.
        chosen: Which.
        drawn: Whether ``maps/`` has all of them in their full size.
    """
    samples, dataset = data.samples("test"), data.dataset("test")
    names = picture_names(samples)
    listed: list[dict[str, Any]] = []
    for one in track(chosen, "drawing the gallery"):
        if one.image not in kept:
            continue
        item, row = dataset[one.image], rows[one.image]
        file = f"{names[one.image]}.webp"
        panels = side_by_side(
            item["image"].permute(1, 2, 0).numpy(),
            kept.load(one.image)["map"],
            ranges[row["category"]],
            item["mask"].numpy() if "mask" in item else None,
        )
        with atomic_path(folder / GALLERY / file) as temporary:
            Image.fromarray(panels).save(temporary, quality=QUALITY)
        listed.append(
            {
                "picture": file,
                "name": names[one.image],
                "kind": one.kind,
                "category": row["category"],
                "label": row["label"],
                "score": row["image_score"],
                "gap": one.gap,
                "full": drawn,
                "mask": "mask" in item,
            }
        )
    if listed:
        write_json(folder / GALLERY / f"{GALLERY}.json", {"pictures": listed})


def side_by_side(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    scale: Sequence[float],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.uint8]:
    """Lay image, heat map and, if known, mask side by side.

    Args:
        image: RGB ``(H, W, 3)``.
        anomaly_map: ``(h, w)``.
        scale: The map's values that are shown darkest and brightest.
        mask: ``(h, w)`` or None.

    Returns:
        RGB; the longer side of each panel is `PANEL` pixels.
    """
    height, width = image.shape[:2]
    shrink = PANEL / max(height, width)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    low, high = scale
    panels = [image, heat_map(anomaly_map, low, high)]
    if mask is not None:
        panels.append(np.repeat(mask[..., None].astype(np.uint8) * WHITE, 3, axis=2))
    sheet = Image.new("RGB", ((size[0] + GAP) * len(panels) - GAP, size[1]), "white")
    for number, panel in enumerate(panels):
        fitted = Image.fromarray(panel).resize(size, Image.Resampling.BILINEAR)
        sheet.paste(fitted, (number * (size[0] + GAP), 0))
    return np.asarray(sheet)


def panels_of(sheet: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """Take a picture of :func:`side_by_side` apart again."""
    width = (sheet.shape[1] + GAP) // count - GAP
    return [sheet[:, start : start + width] for start in range(0, sheet.shape[1], width + GAP)]
