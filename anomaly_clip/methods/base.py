"""What all methods share: steps, the evaluator, and what a run must know of the weights."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.files import write_json
from anomaly_clip.maps import resize_maps
from anomaly_clip.methods.evaluated import (
    EvaluatedModule,
    check_backbone,
    frozen_dtype,
    without_backbone,
)
from anomaly_clip.metrics.curves import CURVES_FILE
from anomaly_clip.metrics.evaluator import Evaluator, EvaluatorSettings
from anomaly_clip.records import Batch, LoaderNeeds, Scores, WeightsRecord

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["AnomalyMethod"]


class AnomalyMethod(EvaluatedModule):
    """A method that scores images; a subclass says how, this class does the rest.

    Args:
        evaluator: How figures are computed.
    """

    is_detector: ClassVar[bool] = True
    one_category: ClassVar[bool] = False
    """Whether a model is of one category only."""
    score_part_names: ClassVar[tuple[str, ...]] = ()
    """What the columns of ``score_parts`` are called."""
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator"})
    backbone: FrozenBackbone
    """Frozen; it casts its own weights when a run asks for mixed precision."""

    def __init__(self, evaluator: EvaluatorSettings = EvaluatorSettings()) -> None:
        super().__init__()
        self.evaluator_settings = evaluator

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square images that ``score`` takes, in pixels."""

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders: images of its size."""
        return LoaderNeeds(self.image_size)

    @property
    def weights(self) -> WeightsRecord:
        """The weights of the backbone."""
        return self.backbone.weights

    @abstractmethod
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images; the whole inference of a method is in here.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating and normalised already.
            categories: What each image shows.
        """

    def score_features(self, features: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score what the frozen encoder said of images; for methods that keep it.

        Args:
            features: As a data set hands them out in place of images.
            categories: What each image shows.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no features")

    def take_references(self, data: AnomalyData, category: str) -> None:
        """Look at a category's references, for methods that compare with them, without a run."""

    def prepare(self, categories: list[str]) -> None:
        """Do what is needed once per category before images come; the model is on its device."""

    def setup(self, stage: str) -> None:
        """Build the evaluator for the data module's categories; cast the frozen backbone.

        Raises:
            ValueError: If figures are asked for and no data module says which categories there are.
        """
        _ = self.backbone.identity  # of the weights as they were loaded: bf16-true casts them next
        dtype = frozen_dtype(str(self.trainer.precision), self.trainer.strategy.root_device)
        if dtype is not None:
            self.backbone.cast(dtype)
        data = self.data
        if data is not None:
            self._check_one_category(data, stage)
            validating = stage in ("fit", "validate")
            categories = data.validation_categories() if validating else data.categories
            self.evaluator = Evaluator(categories, self.evaluator_settings)
        elif stage in ("validate", "test"):
            raise ValueError(
                f"{type(self).__name__}: {TrainerFn(stage).value} needs a data module of "
                "anomaly_clip.data (datamodule=)"
            )

    def _check_one_category(self, data: AnomalyData, stage: str) -> None:
        names = data.train_categories if stage == "fit" else data.categories
        if self.one_category and len(names) > 1:
            raise ValueError(
                f"{type(self).__name__} is one model a category, and data.root {data.root} has "
                f"{len(names)}: choose one, as --data.categories '[{names[0]}]', or take all in "
                f"turn with anomaly_clip each"
            )

    def words(self, category: str) -> str:
        """Return what a category is called in sentences."""
        return category if self.data is None else self.data.words(category)

    @property
    def dataset_name(self) -> str | None:
        """Which data set is scored, if one is."""
        data = self.data
        if data is None:
            return None
        validating = self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)
        return data.validation.source.dataset_name if validating else data.dataset_name

    @property
    def external_weights(self) -> dict[str, str] | None:
        """File and sha256 of trained weights that were neither fitted here nor of a checkpoint."""
        return None

    def evaluation_protocol(self) -> dict[str, Any]:
        """Return how the metrics were computed, and whether anything was fitted for them."""
        settings, external = self.evaluator_settings, self.external_weights
        return {
            **({} if external is None else {"auxiliary": None}),  # it is not known what from
            "fitted": self.must_be_fitted or external is not None,
            "borrowed": external,
            "pixels": settings.pixels,
            "pro_steps": settings.pro_steps,
            "fpr_limit": settings.fpr_limit,
            # Nothing of the data set was learnt from.
            **({} if external is None else {"overlap": None}),
        }

    @property
    def evaluation_note(self) -> str:
        """The form of PRO."""
        steps = self.evaluator_settings.pro_steps
        return f"; PRO {'over all thresholds' if steps is None else f'in {steps} steps'}"

    def image_rows(self, outputs: Scores, batch: Batch) -> list[dict[str, Any]]:
        """Return path, category, label, image score and its parts of each image."""
        labelled = self.data is None or self.data.has_labels
        scores = outputs["image_score"].float().tolist()
        parts: list[list[float]] = [[] for _ in scores]
        if "score_parts" in outputs:
            parts = outputs["score_parts"].float().tolist()
        return [
            {
                "path": batch["path"][row],
                "category": batch["category"][row],
                "label": int(batch["label"][row]) if labelled else None,
                "image_score": scores[row],
                **(dict(zip(self.score_part_names, parts[row], strict=True)) if parts[row] else {}),
            }
            for row in range(len(scores))
        ]

    def final_scores(self) -> dict[int, float]:
        """Return the image scores of the whole set, whose parts are scaled over it."""
        images = self.evaluator.images
        assert images is not None
        return dict(zip(images.index.tolist(), images.score.tolist(), strict=True))

    def write_extras(self, folder: Path) -> None:
        """Write the curves behind the metrics."""
        write_json(folder / CURVES_FILE, self.evaluator.curves)

    def validation_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch and hand it to the evaluator."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch and hand it to the evaluator."""
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch."""
        return self._score(batch)

    def on_validation_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_test_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_predict_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_validation_epoch_end(self) -> None:
        """Compute and log the figures as ``val/...``."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the figures as ``test/...``."""
        self._finish("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone out; keep what identifies it."""
        checkpoint["state_dict"] = without_backbone(checkpoint["state_dict"])
        checkpoint["backbone"] = {**self.weights, "sha256": self.backbone.identity}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the backbone at hand in its place; loading then misses nothing else.

        Raises:
            ValueError: If the checkpoint was made on another backbone.
        """
        saved = checkpoint.get("backbone", {})
        check_backbone(saved, saved.get("sha256"), self.weights, self.backbone.identity)
        backbone = {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **backbone}

    def configure_optimizers(self) -> Any:
        """Return nothing: a method with gradients to follow says so itself."""
        return None

    def _prepare(self) -> None:
        if self.data is not None:
            with torch.no_grad():
                self.prepare(list(self.evaluator.categories))

    def _score(self, batch: Batch) -> Scores:
        if "features" in batch:
            scores = self.score_features(batch["features"], batch["category"])
        else:
            scores = self.score(batch["image"], batch["category"])
        if "anomaly_map" in scores and "mask" in batch:
            size = (batch["mask"].shape[-2], batch["mask"].shape[-1])
            scores["anomaly_map"] = resize_maps(scores["anomaly_map"], size)
        return scores

    def _evaluate(self, batch: Batch) -> Scores:
        scores = self._score(batch)
        self.evaluator.update(scores, batch)
        return scores

    def _finish(self, prefix: str) -> None:
        self.results = self.evaluator.compute()
        self.evaluator.reset()
        self.log_metrics(prefix, self.results["mean"])
