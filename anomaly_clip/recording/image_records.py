"""Records of the images, kept until the end of a run: a row of scores, and the anomaly map."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from anomaly_clip.data.samples import Sample
from anomaly_clip.files import atomic_path
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.records import Batch, Scores, UnreadableImage
from anomaly_clip.results.folder import claim_scratch
from anomaly_clip.results.map_store import MapStore, Ranges, Rows, merge_ranges

__all__ = ["ImageRecords", "with_kinds"]


class ImageRecords:
    """Rows and maps of the images of one process, in a scratch folder of the run.

    Args:
        folder: Scratch folder, shared by all processes.
        with_stages: Whether to store the maps of a method's intermediate steps too.
        longest: Longest side in pixels to which larger maps are shrunk; None: no shrinking.
        with_maps: Whether to store maps at all.
    """

    def __init__(
        self, folder: Path, with_stages: bool, longest: int | None, with_maps: bool
    ) -> None:
        self.folder = folder
        self.rows: Rows = {}
        self.maps = MapStore(folder, with_stages, longest)
        self.with_maps = with_maps
        self.unreadable: list[UnreadableImage] = []
        """Images that could not be read; after `gather`, those of all processes."""
        self.num_scored = 0
        """Number of images that were scored; after `gather`, by all processes."""
        self.with_highest = False
        """True if the highest value of each map is kept."""
        self.highest: dict[int, float] = {}
        """Highest value of each map; after `gather`, of all processes."""
        self._without_pixels: list[int] = []

    def keep(self, module: EvaluatedModule, outputs: Any, batch: Batch) -> None:
        """Store the outputs of a step for a batch."""
        indices = batch["index"].tolist()
        self.unreadable += batch.get("unreadable", [])
        self.num_scored += len(indices)
        self.rows.update(zip(indices, module.image_rows(outputs, batch), strict=True))
        if not module.is_detector:
            return
        if "mask" in batch:
            empty = batch["label"] & ~batch["mask"].flatten(1).any(dim=1)
            self._without_pixels += batch["index"][empty].tolist()
        scores: Scores = outputs
        if self.with_highest and "anomaly_map" in scores:
            highest = scores["anomaly_map"].float().flatten(1).amax(dim=1)
            self.highest.update(zip(indices, highest.tolist(), strict=True))
        if self.with_maps:
            self.maps.keep(scores, indices, batch["category"])

    def replace_scores(self, scores: dict[int, float]) -> None:
        """Replace the scores of steps by final scores, which depend on all evaluated images."""
        if scores:
            for index, row in self.rows.items():
                row["image_score"] = scores[index]

    def gather(self, trainer: Trainer) -> tuple[Rows, Ranges, int]:
        """Gather the records of all processes.

        Returns:
            The rows in the order of the listing, the ranges of the maps by category, and the number
            of anomalous images whose mask is empty.
        """
        file = self.folder / f"rank-{trainer.global_rank}.json"
        record = {
            "rows": self.rows,
            "ranges": self.maps.ranges,
            "highest": self.highest,
            "unseen": self._without_pixels,
            "unreadable": self.unreadable,
        }
        claim_scratch(self.folder)
        with atomic_path(file) as temporary:  # unlike results, with names as they are
            temporary.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
        trainer.strategy.barrier("scores are written")
        rows: Rows = {}
        ranges: list[Ranges] = []
        without_pixels: set[int] = set()
        unreadable: list[UnreadableImage] = []
        for rank in range(trainer.world_size):
            part = json.loads((self.folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
            rows.update({int(index): row for index, row in part["rows"].items()})
            self.highest.update({int(i): value for i, value in part["highest"].items()})
            without_pixels.update(part["unseen"])
            unreadable += [UnreadableImage(*image) for image in part["unreadable"]]
            ranges.append(part["ranges"])
        self.unreadable, self.num_scored = sorted(unreadable), len(rows)
        return dict(sorted(rows.items())), merge_ranges(ranges), len(without_pixels)

    def clear(self, trainer: Trainer) -> None:
        """Remove the scratch folder once no process needs it."""
        trainer.strategy.barrier("images are drawn")
        if trainer.is_global_zero:
            self.maps.clear()


def with_kinds(rows: Rows, samples: Sequence[Sample]) -> Rows:
    """Return the rows with the kind of defect of each image, if there are several kinds.

    Args:
        rows: Rows of the images of a test, by index.
        samples: The listed images.
    """
    kinds = {
        index: samples[index].defect if row.get("label") else "" for index, row in rows.items()
    }
    if len(set(kinds.values()) - {""}) < 2:
        return rows
    return {index: {**row, "defect": kinds[index]} for index, row in rows.items()}
