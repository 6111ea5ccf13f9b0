"""What all methods share: steps, the evaluator, and what a run must know of the weights."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.maps import resize_maps
from anomaly_clip.metrics.evaluator import Evaluator, EvaluatorSettings, Results
from anomaly_clip.records import Batch, Scores, WeightsRecord

__all__ = ["AnomalyMethod", "Exporter", "frozen_dtype"]


@runtime_checkable
class Exporter(Protocol):
    """A module whose training ends in weights for others."""

    @property
    def export_name(self) -> str:
        """The file that they are written to."""

    def export(self, folder: Path) -> Path:
        """Write the weights into a folder and return the file."""


class AnomalyMethod(LightningModule, ABC):
    """A method that scores images; a subclass says how, this class does the rest.

    Args:
        evaluator: How figures are computed.
    """

    must_be_fitted: ClassVar[bool]
    """Whether ``test`` and ``predict`` need the checkpoint of a ``fit``."""
    can_be_fitted: ClassVar[bool]
    one_category: ClassVar[bool] = False
    """Whether a model is of one category only."""
    without_gradients: ClassVar[bool] = False
    """Whether ``fit`` looks once at all images, each on one process, and follows no gradient."""
    score_part_names: ClassVar[tuple[str, ...]] = ()
    """What the columns of ``score_parts`` are called."""
    free_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator"})
    """Arguments that may differ from those of a checkpoint: they change no weight."""
    starting_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that say where a fit starts from; with a checkpoint they are not looked at."""
    backbone: FrozenBackbone
    """Frozen; it casts its own weights when a run asks for mixed precision."""

    def __init__(self, evaluator: EvaluatorSettings = EvaluatorSettings()) -> None:
        super().__init__()
        self.evaluator_settings = evaluator
        self.results: Results | None = None
        """The figures of the last evaluation."""
        self.reference_paths: dict[str, list[str]] = {}
        """Which normal images a category's images are compared with."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square images that ``score`` takes, in pixels."""

    @property
    def weights(self) -> WeightsRecord:
        """Which weights the method uses."""
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

    @property
    def data(self) -> AnomalyData | None:
        """The data module in use, if a trainer has one."""
        if self._trainer is None:
            return None
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, AnomalyData) else None

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
        if validating and data.val_split == "auxiliary" and data.auxiliary is not None:
            return data.auxiliary.dataset_name
        return data.dataset_name

    @property
    def borrowed(self) -> dict[str, str] | None:
        """File and sha256 of trained weights that were neither fitted here nor of a checkpoint."""
        return None

    def protocol(self) -> dict[str, Any]:
        """Return what of the method its figures depend on and belongs beside them."""
        return {}

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
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not _of_backbone(k)}
        checkpoint["backbone"] = {**self.weights, "sha256": self.backbone.identity}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the backbone at hand in its place; loading then misses nothing else.

        Raises:
            ValueError: If the checkpoint was made on another backbone.
        """
        made_on = checkpoint.get("backbone", {})
        if made_on.get("sha256") != self.backbone.identity:
            here = self.weights
            raise ValueError(
                f"the checkpoint was made on {made_on.get('backbone')} with "
                f"{made_on.get('pretrained')}, not on {here['backbone']} with "
                f"{here['pretrained']}, or on other tensors of that name"
            )
        own = {k: v for k, v in self.state_dict().items() if _of_backbone(k)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}

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
        figures = {f"{prefix}/{k}": v for k, v in self.results["mean"].items() if v is not None}
        if self.weights["random"]:
            figures[f"{prefix}/random_weights"] = 1.0  # so that no log shows figures without it
        self.log_dict(figures, rank_zero_only=True)


def _of_backbone(key: str) -> bool:
    return key.startswith("backbone.")


def frozen_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type that frozen weights are cast to for a trainer's precision, None for none.

    A CPU without bf16 instructions would be slower with them: there weights stay in float32, with a
    warning.
    """
    if not precision.endswith("-mixed"):
        return None
    if device.type == "cpu":
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16
        warnings.warn(
            f"precision {precision}: this CPU has no bf16 instructions, the frozen backbone stays "
            f"in float32",
            stacklevel=2,
        )
        return None
    return torch.float16 if precision.startswith("16") else torch.bfloat16
