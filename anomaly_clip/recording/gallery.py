"""Gallery of the report page: small images, and next to each an overlay, heat map and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.drawing.draw import grid
from anomaly_clip.drawing.overlay import blend
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.files import atomic_path, write_json
from anomaly_clip.masks import solid
from anomaly_clip.progress import track
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.folder import GALLERY
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names
from anomaly_clip.results.selection import SelectedImage, decided_score

__all__ = ["MAP_SIDE", "PANEL", "draw_gallery", "join_panels", "panel_size", "split_panels"]

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
    map_thresholds: Mapping[str, float] = {},
) -> list[UnreadableImage]:
    """Draw the selected images into ``gallery/`` in a run's folder.

    Args:
        folder: The run's folder.
        data: Data set of the images.
        maps: Anomaly maps of the images; an image without a map is left out.
        ranges: Lowest and highest map value by category, the scale of the heat maps.
        rows: Label and score of each image; with a calibration, its p-value and decision.
        selected: Images to draw, in their order on the page.
        has_full_size: Whether ``maps/`` contains full-size drawings of all images.
        map_thresholds: Map thresholds of a calibration by category. The overlay gets the contour of
            the pixels above, and the colour scale of the heat map starts there.

    Returns:
        The images that can no longer be read, which are not drawn.
    """
    samples, read = data.samples("test"), _reader(data)
    names = image_names(samples)
    entries: list[dict[str, Any]] = []
    lost = []
    for index, kind, gap in track(selected, "drawing the gallery"):
        if index not in maps:
            continue
        try:
            image, mask = read(index)
        except UnreadableError as error:
            lost.append(error.described(index, samples[index]))
            continue
        file, row = f"{names[index]}.webp", rows[index]
        low, high = ranges[row["category"]]
        threshold = map_thresholds.get(row["category"])
        if mask is not None and not row["label"] and not mask.any():
            mask = None  # an empty panel
        anomaly_map = maps.load(index)["map"]
        scale = (low if threshold is None else threshold, high)
        # Black throughout, and without a mask to compare it with, a heat map tells nothing.
        has_heat = threshold is None or mask is not None or bool((anomaly_map > threshold).any())
        panels = join_panels(image, anomaly_map, scale if has_heat else None, mask, threshold)
        with atomic_path(folder / GALLERY / file) as temporary:
            Image.fromarray(panels).save(temporary, quality=QUALITY)
        entries.append(
            {
                "picture": file,
                "name": names[index],
                "path": row["path"],
                "kind": kind,
                "category": row["category"],
                "label": row["label"],
                "score": decided_score(row),
                **{key: row[key] for key in ("p_value", "decision") if key in row},
                "gap": gap,
                "full": has_full_size,
                "heat": has_heat,
                "mask": mask is not None,
                "contour": threshold is not None,
                "overlay": has_heat,
                "scale": list(scale),
                "panel": panel_size(image.shape[:2]),
            }
        )
    if entries:
        content: dict[str, Any] = {"pictures": entries}
        if has_full_size:  # of all images, in the order of scores.csv
            content["drawings"] = [[rows[index]["path"], names[index]] for index in rows]
        write_json(folder / GALLERY / f"{GALLERY}.json", content)
    return lost


def _reader(
    data: AnomalyData,
) -> Callable[[int], tuple[NDArray[np.uint8], NDArray[np.bool_] | None]]:
    """Return the function that reads an image and its mask: whole ones, if nothing is cut off."""
    samples, dataset, read = data.samples("test"), data.dataset("test"), data.reader()

    def read_whole(index: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        sample = samples[index]
        with dataset.guard(sample):
            image, mask = read(sample if dataset.has_masks else replace(sample, mask=None))
        return image, None if mask is None else solid(mask)

    def read_part(index: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        item = dataset[index]
        image = item["image"].permute(1, 2, 0).numpy()
        return image, item["mask"].numpy() if "mask" in item else None

    return read_whole if data.resize.rule == "square" else read_part


def join_panels(
    image: NDArray[np.uint8],
    anomaly_map: NDArray[np.floating],
    scale: Sequence[float] | None,
    mask: NDArray[np.bool_] | None,
    threshold: float | None = None,
) -> NDArray[np.uint8]:
    """Place image, overlay, heat map and mask side by side.

    Args:
        image: RGB ``(H, W, 3)``.
        anomaly_map: ``(h, w)``.
        scale: Map values at the lower and the upper end of the colour scale; None: neither overlay
            nor heat map.
        mask: ``(h, w)``, whose outline is on the overlay; None: no mask.
        threshold: Map value whose contour is drawn on the overlay; None: no contour.

    Returns:
        RGB image; the longer side of each panel is `PANEL` pixels.
    """
    size = panel_size(image.shape[:2])
    photograph = _fit(image, size)
    panels = [photograph]
    shown = None if mask is None else _fit(mask.astype(np.uint8) * WHITE, size)
    if scale is not None:
        inside = None if shown is None else np.asarray(shown) > WHITE // 2
        ends = (scale[0], scale[1])
        drawn = blend(np.asarray(photograph), anomaly_map, ends, inside, threshold)
        panels += [Image.fromarray(drawn), _fit(heat_map(anomaly_map, *ends), size)]
    if shown is not None:
        panels.append(shown.convert("RGB"))
    return np.asarray(grid(panels, len(panels), GAP))


def panel_size(size: Sequence[int]) -> tuple[int, int]:
    """Return width and height of the panels of an image of the given height and width."""
    height, width = size
    shrink = PANEL / max(height, width)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _fit(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)


def split_panels(sheet: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """Split an image from :func:`join_panels` into its panels."""
    width = (sheet.shape[1] + GAP) // count - GAP
    return [sheet[:, start : start + width] for start in range(0, sheet.shape[1], width + GAP)]
