"""Drawings of all anomaly maps of a run, one file per image, in the folder ``maps``."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.unreadable import UnreadableError
from anomaly_clip.drawing.panels import draw_panels
from anomaly_clip.files import atomic_path
from anomaly_clip.images import solid
from anomaly_clip.progress import track
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, image_names

__all__ = ["draw_map_images"]


def draw_map_images(
    folder: Path,
    data: AnomalyData,
    maps: MapStore,
    ranges: Ranges,
    rows: Rows,
    own_size: bool,
    warning: str | None,
) -> list[UnreadableImage]:
    """Draw each image whose maps were stored, with its maps and mask, in a file per image.

    Args:
        folder: Destination of ``category/defect/name.png``.
        data: Data set of the images.
        maps: Anomaly maps of the images.
        ranges: Lowest and highest map value by category, the scale of the heat maps.
        rows: Label and score of each image.
        own_size: Whether to draw images at their original size instead of the method's size.
        warning: Warning to draw in red, one line; None: no warning.

    Returns:
        The images that can no longer be read, which are not drawn.
    """
    samples = data.samples("test")
    dataset, read, names = data.dataset("test"), data.reader(), image_names(samples)
    lost = []
    for index in track(maps.indices, "drawing maps"):
        sample, row = samples[index], rows[index]
        size = None
        try:
            if own_size:
                with dataset.guard(sample):
                    image, full_mask = read(sample)
                mask = None if full_mask is None else solid(full_mask)
                size = (image.shape[0], image.shape[1])
            else:
                item = dataset[index]
                image = item["image"].permute(1, 2, 0).numpy()
                mask = item["mask"].numpy() if "mask" in item else None
        except UnreadableError as error:
            lost.append(error.described(index, sample))
            continue
        state = {0: "normal", 1: "anomalous", None: ""}[row["label"]]
        low, high = ranges[sample.category]
        maps_by_name = maps.load(index, size)
        sheet = draw_panels(
            image,
            maps_by_name.pop("map"),
            mask,
            (low, high),
            f"{names[index]}   {state}   score {row['image_score']:.4g}",
            warning,
            maps_by_name,
        )
        with atomic_path(folder / f"{names[index]}.png") as temporary:
            Image.fromarray(sheet).save(temporary)
    return lost
