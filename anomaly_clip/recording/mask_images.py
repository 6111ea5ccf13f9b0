"""Binary masks of the pixels above the map threshold, in the folder ``masks``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.files import atomic_path
from anomaly_clip.images import read_header
from anomaly_clip.progress import track
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.map_store import MapStore, image_names, resize_map

__all__ = ["write_masks"]


def write_masks(
    folder: Path,
    data: AnomalyData,
    maps: MapStore,
    thresholds: Mapping[str, float],
    own_size: bool,
) -> list[UnreadableImage]:
    """Write a mask for each image whose map was stored: grey PNG, 255 above the threshold, else 0.

    Args:
        folder: Destination of ``category/defect/name.png``.
        data: Data set of the images.
        maps: Anomaly maps of the images.
        thresholds: Map threshold by category.
        own_size: Whether masks have the original size of the image instead of the map's.

    Returns:
        The images that can no longer be read, which have no mask.
    """
    samples = data.samples("test")
    dataset, read, names = data.dataset("test"), data.reader(), image_names(samples)
    lost = []
    for index in track(maps.indices, "writing masks"):
        sample, values = samples[index], maps.load(index)["map"]
        if own_size:
            try:
                with dataset.guard(sample):
                    if data.on_disk:
                        width, height = read_header(sample.image).size
                    else:
                        height, width = read(sample)[0].shape[:2]
            except UnreadableError as error:
                lost.append(error.described(index, sample))
                continue
            values = resize_map(values, (height, width))
        mask = (values > thresholds[sample.category]).astype(np.uint8) * 255
        with atomic_path(folder / f"{names[index]}.png") as temporary:
            Image.fromarray(mask).save(temporary, format="PNG")
    return lost
