"""Images of a run, written at its end: drawings of maps, masks, raw maps, and the gallery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.files import atomic_path
from anomaly_clip.progress import track
from anomaly_clip.recording.map_images import draw_map_images
from anomaly_clip.recording.mask_images import write_masks
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.folder import MASKS
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names

__all__ = ["write_map_files"]


def write_map_files(
    folder: Path,
    data: AnomalyData,
    maps: MapStore,
    ranges: Ranges,
    rows: Rows,
    own_size: bool,
    draws: bool,
    masks: bool,
    raw_maps: bool,
    thresholds: Mapping[str, float],
    warning: str | None,
) -> list[UnreadableImage]:
    """Write the files of the maps that this process has stored.

    Args:
        folder: The run's folder.
        data: Data set of the images.
        maps: Anomaly maps of the images.
        ranges: Lowest and highest map value by category, the scale of the heat maps.
        rows: Label and score of each image.
        own_size: Whether drawings and masks have the original size of the image.
        draws: Whether to draw ``maps/``; see :func:`~.map_images.draw_map_images`.
        masks: Whether to write ``masks/``; see :func:`~.mask_images.write_masks`.
        raw_maps: Whether to write ``raw_maps/``, as float16 ``(h, w)``.
        thresholds: Map threshold by category.
        warning: Warning to draw in red, one line; None: no warning.

    Returns:
        The images that can no longer be read.
    """
    lost = []
    if draws:
        place = folder / "maps"
        lost += draw_map_images(place, data, maps, ranges, rows, own_size, warning, thresholds)
    if masks:
        lost += write_masks(folder / MASKS, data, maps, thresholds, own_size)
    if raw_maps:
        names = image_names(data.samples("test"))
        for index in track(maps.indices, "saving maps"):
            with atomic_path(folder / "raw_maps" / f"{names[index]}.npy") as temporary:
                np.save(temporary, maps.load(index)["map"].astype(np.float16))
    return lost
