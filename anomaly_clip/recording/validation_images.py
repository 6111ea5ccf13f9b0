"""Drawings of a few validation images, to follow the progress of a fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.drawing.draw import save_drawing
from anomaly_clip.drawing.panels import draw_panels, stack_sheets
from anomaly_clip.files import atomic_path
from anomaly_clip.images import evenly_spaced
from anomaly_clip.records import Batch, Scores

__all__ = ["ValidationImages"]


class ScoredImage(NamedTuple):
    """An image with its mask, its maps, and a caption."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    anomaly_map: NDArray[np.float32]
    stages: dict[str, NDArray[np.float32]]
    caption: str


class ValidationImages:
    """A few normal and anomalous images of each validation, from as many categories as possible.

    Args:
        count: Number of images to draw; 0 for none.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[tuple[str, bool], list[ScoredImage]] = {}

    def add(self, scores: Scores, batch: Batch, num_categories: int) -> None:
        """Store some images of a batch, unless images or maps are missing.

        Args:
            scores: Scores of the batch.
            batch: The scored images.
            num_categories: Number of validation categories.
        """
        if "anomaly_map" not in scores or "image" not in batch:
            return
        per_group = math.ceil(self.count / (2 * num_categories))
        for row, category in enumerate(batch["category"]):
            anomalous = bool(batch["label"][row])
            group = self._kept.setdefault((category, anomalous), [])
            if len(group) < per_group:
                group.append(_scored_image(scores, batch, row, anomalous))

    def draw(self, file: Path, warning: str | None) -> None:
        """Draw the stored images below each other, with maps on one scale, then discard the images.

        Args:
            file: Destination; it is not written if there is nothing to draw.
            warning: Warning to draw in red, one line; None: no warning.
        """
        kept = [image for group in self._kept.values() for image in group]
        self._kept = {}
        if not kept or self.count == 0:
            return
        shown = [kept[index] for index in evenly_spaced(self.count, len(kept))]
        low = min(float(scored.anomaly_map.min()) for scored in shown)
        high = max(float(scored.anomaly_map.max()) for scored in shown)
        sheets = [
            draw_panels(
                scored.image,
                scored.anomaly_map,
                scored.mask,
                (low, high),
                scored.caption,
                warning,
                scored.stages,
            )
            for scored in shown
        ]
        with atomic_path(file) as temporary:
            save_drawing(Image.fromarray(stack_sheets(sheets)), temporary)


def _scored_image(scores: Scores, batch: Batch, row: int, anomalous: bool) -> ScoredImage:
    state = "anomalous" if anomalous else "normal"
    return ScoredImage(
        image=batch["image"][row].permute(1, 2, 0).cpu().numpy(),
        mask=batch["mask"][row].cpu().numpy() if "mask" in batch else None,
        anomaly_map=scores["anomaly_map"][row].float().cpu().numpy(),
        stages={
            name: maps[row].float().cpu().numpy()
            for name, maps in scores.get("stage_maps", {}).items()
        },
        caption=f"{batch['category'][row]}   {state}   score {scores['image_score'][row]:.4g}",
    )
