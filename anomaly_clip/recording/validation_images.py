"""A few pictures of each validation, so that one can watch a method learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.drawing.panels import draw_panels, stack_sheets
from anomaly_clip.files import atomic_path
from anomaly_clip.records import Batch, Scores

__all__ = ["Watched"]


class Picture(NamedTuple):
    """An image, what is known and what is said of it."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    anomaly_map: NDArray[np.float32]
    stages: dict[str, NDArray[np.float32]]
    words: str


class Watched:
    """Keep a few images of a validation, of as many categories as can be, normal and anomalous.

    Args:
        count: How many are drawn; 0 for none.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[tuple[str, bool], list[Picture]] = {}

    def add(self, scores: Scores, batch: Batch, num_categories: int) -> None:
        """Look at a batch; only maps and images that can be drawn count.

        Args:
            scores: What a method says.
            batch: Of what.
            num_categories: How many the validation has.
        """
        if "anomaly_map" not in scores or "image" not in batch:
            return
        of_each = math.ceil(self.count / (2 * num_categories))
        for row, category in enumerate(batch["category"]):
            anomalous = bool(batch["label"][row])
            kept = self._kept.setdefault((category, anomalous), [])
            if len(kept) < of_each:
                kept.append(_picture(scores, batch, row, anomalous))

    def draw(self, file: Path, warning: str | None) -> None:
        """Draw what was kept below each other, maps on one scale, and forget it.

        Args:
            file: Where to; without anything to draw it is not written.
            warning: One line in red.
        """
        found = [picture for kept in self._kept.values() for picture in kept]
        self._kept = {}
        if not found or self.count == 0:
            return
        places = np.linspace(0, len(found) - 1, min(self.count, len(found))).round().astype(int)
        chosen = [found[place] for place in places]
        low = min(float(picture.anomaly_map.min()) for picture in chosen)
        high = max(float(picture.anomaly_map.max()) for picture in chosen)
        sheets = [
            draw_panels(
                picture.image,
                picture.anomaly_map,
                picture.mask,
                (low, high),
                picture.words,
                warning,
                picture.stages,
            )
            for picture in chosen
        ]
        with atomic_path(file) as temporary:
            Image.fromarray(stack_sheets(sheets)).save(temporary)


def _picture(scores: Scores, batch: Batch, row: int, anomalous: bool) -> Picture:
    state = "anomalous" if anomalous else "normal"
    return Picture(
        image=batch["image"][row].permute(1, 2, 0).cpu().numpy(),
        mask=batch["mask"][row].cpu().numpy() if "mask" in batch else None,
        anomaly_map=scores["anomaly_map"][row].float().cpu().numpy(),
        stages={
            name: maps[row].float().cpu().numpy()
            for name, maps in scores.get("stage_maps", {}).items()
        },
        words=f"{batch['category'][row]}   {state}   score {scores['image_score'][row]:.4g}",
    )
