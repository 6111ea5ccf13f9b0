"""The contract of modules whose test ends in metrics: what a run asks of them, and nothing else."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from anomaly_clip.metrics.evaluator import Results
from anomaly_clip.records import Batch, LoaderNeeds, TrainingFeatures, WeightsRecord

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = [
    "Confusion",
    "EvaluatedModule",
    "Exporter",
    "FeatureSource",
    "check_backbone",
    "data_module",
    "frozen_dtype",
    "without_backbone",
]


@runtime_checkable
class Exporter(Protocol):
    """A module whose training ends in weights for others."""

    @property
    def export_name(self) -> str:
        """The file that they are written to."""

    def export(self, folder: Path) -> Path:
        """Write the weights into a folder and return the file."""


@runtime_checkable
class FeatureSource(Protocol):
    """A module whose last training features are drawn after a fit."""

    def training_features(self) -> TrainingFeatures | None:
        """Return features of the last images of the training, if there are enough."""


@runtime_checkable
class _DataModule(Protocol):
    """Methods by which a data module of this package is known, without an import of it.

    Methods only: a look at a property would read the disk.
    """

    def validation_categories(self) -> list[str]: ...
    def references(self, category: str, count: int | None = None, seed: int = 0) -> Batch: ...
    def words(self, category: str) -> str: ...


class Confusion(NamedTuple):
    """Counts behind classification metrics."""

    counts: Tensor
    """``(K, K)``, rows true and columns predicted; or ``(K, 2, 2)``, one table per pattern."""
    names: list[str]
    """The classes."""


class EvaluatedModule(LightningModule, ABC):
    """A module that a run can test, record and compare; detectors and the linear probe are both."""

    must_be_fitted: ClassVar[bool]
    """Whether ``test`` and ``predict`` need the checkpoint of a ``fit``."""
    can_be_fitted: ClassVar[bool]
    """Whether there is anything to fit."""
    is_detector: ClassVar[bool]
    """Whether its outputs are :class:`~anomaly_clip.records.Scores`: image scores and maps."""
    inference_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may differ from those of a checkpoint: they change no weight."""
    init_only_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that only say where a fit starts from; a checkpoint replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.results: Results | None = None
        """The metrics of the last evaluation."""
        self.reference_paths: dict[str, list[str]] = {}
        """The normal images that a category's images are compared with."""

    @property
    @abstractmethod
    def weights(self) -> WeightsRecord:
        """The weights that the metrics come from."""

    @property
    @abstractmethod
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders."""

    @abstractmethod
    def image_rows(self, outputs: Any, batch: Batch) -> list[dict[str, Any]]:
        """Return a row of ``scores.csv`` per image.

        Args:
            outputs: What a step returned for the batch.
            batch: Its images.
        """

    def final_scores(self) -> dict[int, float]:
        """Return image scores that only a whole evaluation knows, by the image's index."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """Return the method settings to record with the metrics."""
        return {}

    def evaluation_protocol(self) -> dict[str, Any]:
        """Return how the metrics were computed, to record with them."""
        return {"fitted": True}

    @property
    def evaluation_note(self) -> str:
        """The end of a metrics table's title."""
        return ""

    @property
    def confusion(self) -> Confusion | None:
        """The counts behind classification metrics, if there are any."""
        return None

    def write_extras(self, folder: Path) -> None:
        """Write what a test leaves beside ``metrics.json`` and ``scores.csv``, if anything."""

    @property
    def data(self) -> AnomalyData | None:
        """The data module in use, if a trainer has one of this package."""
        return data_module(self)

    def log_metrics(self, prefix: str, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics that are defined as ``prefix/...``."""
        logged = {f"{prefix}/{name}": v for name, v in metrics.items() if v is not None}
        if self.weights["random"]:
            logged[f"{prefix}/random_weights"] = 1.0  # so that no log shows metrics without it
        self.log_dict(logged, rank_zero_only=True)


def data_module(module: LightningModule) -> AnomalyData | None:
    """Return the data module in use, if the module's trainer has one of this package."""
    if module._trainer is None:
        return None
    data: object = module.trainer.datamodule  # type: ignore[attr-defined]
    return cast("AnomalyData", data) if isinstance(data, _DataModule) else None


def without_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the tensors of the frozen backbone."""
    return {key: value for key, value in state.items() if not key.startswith("backbone.")}


def check_backbone(
    saved: Mapping[str, Any], saved_identity: str | None, weights: WeightsRecord, identity: str
) -> None:
    """Check that a checkpoint was made on the backbone at hand.

    Args:
        saved: The record of weights in the checkpoint.
        saved_identity: The sha256 of the backbone that it was made on.
        weights: The record of the weights at hand.
        identity: The sha256 of the backbone at hand.

    Raises:
        ValueError: If it was made on another backbone.
    """
    if saved_identity != identity:
        raise ValueError(
            f"the checkpoint was made on {saved.get('backbone')} with "
            f"{saved.get('pretrained')}, not on {weights['backbone']} with "
            f"{weights['pretrained']}, or on other tensors of that name"
        )


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
