"""Calibration of a method: scores of normal images, collected by a pass of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from anomaly_clip.data.calibration_images import draw_key
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.decisions.calibration import (
    Calibration,
    CategoryCalibration,
    scaled_score,
)
from anomaly_clip.decisions.conformal import rank_of
from anomaly_clip.decisions.sentences import guarantee
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import number_of, say
from anomaly_clip.recording.scoring_conditions import conditions_of
from anomaly_clip.recording.writer import RunWriter
from anomaly_clip.records import Batch, Scores, UnreadableImage, versions

__all__ = [
    "Calibrated",
    "ScoredImage",
    "ScoredImages",
    "build_category",
    "calibrate",
    "calibration_images",
    "finish",
    "report",
]

MIN_FOR_RANGES = 2
"""Smallest number of images that give the ranges of score parts."""


class ScoredImage(NamedTuple):
    """Scores of a normal image."""

    path: str
    score: float
    parts: list[float] | None
    highest: float | None
    """Highest value of its map; None without a map."""


@dataclass
class ScoredImages(Callback):
    """Collect the scores of a pass over normal images, from all processes.

    Args:
        map_percentile: Percentile of the map values that is asked for; None for their maxima alone.
        quiet: Whether to print no start line.
    """

    map_percentile: float | None = None
    quiet: bool = False
    images: dict[str, dict[int, ScoredImage]] = field(default_factory=dict)
    """By category and index in the listing."""
    unreadable: list[UnreadableImage] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    scaled_parts: tuple[bool, ...] = ()
    """True for each score part that is scaled; empty: all are."""
    highest_pixels: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Highest map values of each category, as many as the percentile of all images needs."""
    num_pixels: dict[str, int] = field(default_factory=dict)
    """Number of all map values of each category so far."""
    at_threshold: dict[str, str] = field(default_factory=dict)
    """Image whose score is the threshold, by category."""
    _num_kept: dict[str, int] = field(default_factory=dict)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the start line."""
        data = _data(trainer)
        if trainer.is_global_zero and not self.quiet:
            name = f"{data.dataset_name} {data.root}"
            say(f"calibrate {type(pl_module).__name__} | {name}: {data.summary('predict')}")
            for remark in data.calibration.remarks:
                say(remark)
            limit = trainer.limit_predict_batches
            if isinstance(limit, int) or limit < 1:  # 1 is a batch, 1.0 all of them
                say(
                    f"trainer.limit_predict_batches {limit}: only the first images, by their "
                    f"names, are calibrated on, and they may differ from the others"
                )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of a batch."""
        scores: Scores = outputs
        self.unreadable += batch.get("unreadable", [])
        parts = scores["score_parts"].float().tolist() if "score_parts" in scores else None
        values = scores["image_score"].float().tolist()
        maps = scores.get("anomaly_map")
        highest = None if maps is None else maps.float().flatten(1).amax(dim=1).tolist()
        for row, index in enumerate(batch["index"].tolist()):
            category = batch["category"][row]
            image = ScoredImage(
                batch["path"][row],
                values[row],
                None if parts is None else parts[row],
                None if highest is None else highest[row],
            )
            self.images.setdefault(category, {})[index] = image
            if maps is not None and self.map_percentile is not None:
                self._keep_pixels(trainer, category, maps[row].float().cpu().numpy())

    def _keep_pixels(self, trainer: Trainer, category: str, values: NDArray[np.float32]) -> None:
        """Keep the map values that may be above the percentile of all images of the category."""
        if category not in self._num_kept:
            listed = sum(s.category == category for s in _data(trainer).samples("test"))
            self._num_kept[category] = self._num_above(listed * values.size)
        before = self.highest_pixels.get(category, np.empty(0, np.float32))
        every = np.concatenate([before, values.ravel()])
        self.highest_pixels[category] = _highest(every, self._num_kept[category])
        self.num_pixels[category] = self.num_pixels.get(category, 0) + values.size

    def _num_above(self, num_pixels: int) -> int:
        """Return how many of the highest values end with the percentile."""
        assert self.map_percentile is not None
        # The decimal fraction that was typed: (1 - 90 / 100) * 320 is below 32 in binary.
        return 1 + int((100 - Fraction(str(self.map_percentile))) * num_pixels / 100)

    def percentile(self, category: str) -> float:
        """Return the percentile of the map values of the images that were scored."""
        count = self._num_above(self.num_pixels[category])
        return float(_highest(self.highest_pixels[category], count).min())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the scores of all processes, and the conditions under which they were computed."""
        assert isinstance(pl_module, AnomalyMethod)
        self.conditions = conditions_of(trainer, pl_module, _data(trainer))
        self.scaled_parts = pl_module.scaled_parts
        if trainer.world_size > 1:
            self._gather(trainer)
        self._leave_out_references(trainer, pl_module)
        self.images = {name: dict(sorted(images.items())) for name, images in self.images.items()}

    def _leave_out_references(self, trainer: Trainer, method: AnomalyMethod) -> None:
        """Drop reference images and their copies, whose scores are lower than those of others."""
        keys_of_paths = _data(trainer).calibration.keys_of_paths
        for category, paths in method.reference_paths.items():
            images = self.images.get(category, {})
            references = set(keys_of_paths(paths).values())
            keys = keys_of_paths([image.path for image in images.values()])
            kept = {i: image for i, image in images.items() if keys[image.path] not in references}
            if len(kept) < len(images):
                self.images[category] = kept
                if trainer.is_global_zero:
                    number = number_of(len(images) - len(kept), "reference image")
                    say(f"{category}: {number} are not calibrated on")

    def _gather(self, trainer: Trainer) -> None:
        parts: list[Any] = [None] * trainer.world_size
        mine = (self.images, self.unreadable, self.highest_pixels, self.num_pixels)
        torch.distributed.all_gather_object(parts, mine)
        self.images, self.unreadable, self.num_pixels = {}, [], {}
        pixels: dict[str, list[NDArray[np.float32]]] = {}
        for images, unreadable, highest, counts in parts:
            self.unreadable += unreadable
            for category, count in counts.items():
                self.num_pixels[category] = self.num_pixels.get(category, 0) + count
            for category, rows in images.items():
                self.images.setdefault(category, {}).update(rows)
            for category, values in highest.items():
                pixels.setdefault(category, []).append(values)
        self.highest_pixels = {name: np.concatenate(values) for name, values in pixels.items()}
        self.unreadable.sort()


@dataclass(frozen=True)
class Calibrated:
    """Outcome of a calibration.

    Args:
        calibration: The calibration, equal in all processes.
        unreadable: Images that could not be read.
        at_threshold: Image whose score is the threshold, by category.
    """

    calibration: Calibration
    unreadable: Sequence[UnreadableImage] = ()
    at_threshold: Mapping[str, str] = field(default_factory=dict)


def calibrate(
    trainer: Trainer,
    method: AnomalyMethod,
    data: AnomalyData,
    settings: CalibrationSettings,
    checkpoint: str | None = None,
) -> Calibrated:
    """Score the calibration images of a data module, and derive thresholds from the scores.

    Args:
        trainer: Trainer, whose callbacks other than the run's writer are called.
        method: The method; ``calibration`` is set.
        data: Data module.
        settings: Rates, confidence and seed.
        checkpoint: File of the method's weights; None: the method as it is.

    Raises:
        ValueError: If a category has too few normal images.
    """
    scored = ScoredImages(settings.map_percentile)
    with calibration_images(trainer, data, scored):
        trainer.predict(method, datamodule=data, ckpt_path=checkpoint, return_predictions=False)
        categories = {
            name: build_category(
                name, list(scored.images.get(name, {}).values()), data, settings, scored
            )
            for name in data.categories
        }
    return finish(method, data, settings, categories, scored)


def finish(
    method: AnomalyMethod,
    data: AnomalyData,
    settings: CalibrationSettings,
    categories: Mapping[str, CategoryCalibration],
    scored: ScoredImages,
) -> Calibrated:
    """Return the calibration of a method, and keep it in the method.

    A folder without a name is calibrated under the name of the fit.

    Args:
        method: The method.
        data: Data module of the images.
        settings: Rates and confidence.
        categories: Calibrations by the data module's names of the categories.
        scored: The pass over the images, with the conditions of their scores.
    """

    def name_of(category: str) -> str:
        return (data.has_default_name and method.fitted_category) or category

    calibration = Calibration(
        type(method).__name__,
        {name_of(name): record for name, record in categories.items()},
        scored.conditions,
        tuple(settings.alphas),
        settings.confidence,
        versions(),
    )
    method.calibration = calibration.as_dict()
    images = {name_of(name): path for name, path in scored.at_threshold.items()}
    return Calibrated(calibration, scored.unreadable, images)


@contextmanager
def calibration_images(trainer: Trainer, data: AnomalyData, scored: ScoredImages) -> Iterator[None]:
    """Let calibration images take the place of the test images of a data module."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [c for c in callbacks if not isinstance(c, RunWriter)] + [scored]  # type: ignore[attr-defined]
    data.calibration.is_scored = True
    data.listing.forget()
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        data.calibration.is_scored = False
        data.listing.forget()


def build_category(
    name: str,
    images: list[ScoredImage],
    data: AnomalyData,
    settings: CalibrationSettings,
    scored: ScoredImages,
    kind: Literal["split", "cross_validation"] = "split",
) -> CategoryCalibration:
    """Return the calibration of a category from the scores of its images.

    If scores have parts, a third of the images gives their ranges, and the method is calibrated on
    the others. A part that is not scaled has the range 0 to 1, which leaves it as it is.

    Args:
        name: The category.
        images: Its images.
        data: Data module of the images.
        settings: Options of the calibration.
        scored: The pass over the images.
        kind: See `CategoryCalibration`.

    Raises:
        ValueError: If there are too few images.
    """
    keys = data.calibration.keys_of_paths([image.path for image in images])
    in_order = sorted(images, key=lambda image: draw_key(keys[image.path], settings.seed))
    ranges: tuple[tuple[float, float], ...] | None = None
    calibrated = in_order
    if images and images[0].parts is not None:
        count = max(MIN_FOR_RANGES, len(images) // 3)
        parts = np.array([image.parts for image in in_order[:count]], dtype=np.float64)
        calibrated = in_order[count:]
        scaled = scored.scaled_parts or (True,) * parts.shape[1]
        ranges = tuple(
            (float(low), float(high)) if is_scaled else (0.0, 1.0)
            for low, high, is_scaled in zip(
                parts.min(axis=0), parts.max(axis=0), scaled, strict=True
            )
        )
    if not calibrated:
        needed = 1 if ranges is None else MIN_FOR_RANGES + 1
        raise ValueError(
            f"{name}: {len(images)} normal images are too few to calibrate on, at least {needed} "
            f"are needed: add images"
        )
    if ranges is None:
        values = np.array([image.score for image in calibrated], dtype=np.float64)
    else:
        values = scaled_score([image.parts or [] for image in calibrated], ranges)
    k = max(1, rank_of(settings.alphas[0], len(values), settings.confidence))
    scored.at_threshold[name] = calibrated[int(np.argsort(values, kind="stable")[-k])].path
    highest = [image.highest for image in calibrated if image.highest is not None]
    return CategoryCalibration(
        tuple(np.sort(values).tolist()),
        map_threshold=_map_threshold(highest, name, settings, scored) if highest else None,
        part_ranges=ranges,
        images=tuple(sorted(keys.values())) if data.on_disk else (),
        words=data.words(name),
        kind=kind,
    )


def _map_threshold(
    highest: list[float], name: str, settings: CalibrationSettings, scored: ScoredImages
) -> float:
    """Return the map value above which pixels are marked."""
    if settings.map_percentile is not None:
        return scored.percentile(name)
    k = max(1, rank_of(settings.alphas[0], len(highest), settings.confidence))
    return float(np.sort(highest)[-k])


def _highest(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the highest values, in any order."""
    return values if count >= len(values) else np.partition(values, -count)[-count:]


def report(calibrated: Calibrated) -> None:
    """Print the thresholds of each category with their guarantees, and what was left out."""
    calibration, unreadable = calibrated.calibration, calibrated.unreadable
    for name, record in calibration.categories.items():
        num_ranges = len(record.images) - record.num_images
        if record.part_ranges is not None and num_ranges > 0:
            others = number_of(num_ranges, "other image")
            say(f"{name}: {others} gave the ranges of the parts of its score")
        for alpha in calibration.alphas:
            level = record.level(alpha, calibration.confidence)
            say(f"{name}: anomalous above {level.threshold:.6g}. {guarantee(record, level)}")
        image = calibrated.at_threshold.get(name)
        if image is not None and record.level(calibration.alphas[0], calibration.confidence).k == 1:
            say(
                f"{name}: the threshold is the highest score, that of {image}: if it shows a "
                f"defect, move it away and calibrate again"
            )
    if unreadable:
        number = number_of(len(unreadable), "normal image")
        such_as = f"{unreadable[0].path}: {unreadable[0].reason}"
        say(f"{number} could not be read, such as {such_as}", style="bold red")


def _data(trainer: Trainer) -> AnomalyData:
    data: AnomalyData = trainer.datamodule  # type: ignore[attr-defined]
    return data
