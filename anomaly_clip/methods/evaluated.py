"""Interface through which a run tests and records a detector or the linear probe."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from anomaly_clip.metric_values import Results
from anomaly_clip.records import (
    Batch,
    LoaderNeeds,
    TrainingFeatures,
    UseOfShots,
    WeightsRecord,
    source_of,
    variant_of,
)

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = [
    "Confusion",
    "EvaluatedModule",
    "Exporter",
    "FeatureSource",
    "check_backbone",
    "data_module",
    "evaluation_loader",
    "frozen_dtype",
    "is_exceeded",
    "missing_data_module",
    "reached_limit",
    "without_backbone",
]


@runtime_checkable
class Exporter(Protocol):
    """A module that exports trained weights for use elsewhere."""

    @property
    def export_name(self) -> str:
        """Name of the exported file."""

    def export(self, folder: Path) -> Path:
        """Write the weights into a folder and return the path of the file."""


@runtime_checkable
class FeatureSource(Protocol):
    """A module that keeps features of its last training images, which are plotted after a fit."""

    def training_features(self) -> TrainingFeatures | None:
        """Return features of the last training images; None if there are too few images."""


@runtime_checkable
class _DataModule(Protocol):
    """Protocol that recognises a data module of this package without importing its class.

    It lists methods only: an isinstance check would evaluate a property, which reads the disk.
    """

    def validation_categories(self) -> list[str]: ...
    def references(self, category: str, count: int | None = None, seed: int = 0) -> Batch: ...
    def words(self, category: str) -> str: ...


class Confusion(NamedTuple):
    """Confusion matrix of a classifier, or one matrix per pattern."""

    counts: Tensor
    """``(K, K)``, or ``(K, 2, 2)`` per pattern; rows are true classes, columns predicted ones."""
    names: list[str]
    """Class names."""


class EvaluatedModule(LightningModule, ABC):
    """A module that a run can test, record and compare: a detector or the linear probe."""

    must_be_fitted: ClassVar[bool]
    """True if ``test`` and ``predict`` need a checkpoint from ``fit``."""
    can_be_fitted: ClassVar[bool]
    """True if the module supports ``fit``."""
    is_detector: ClassVar[bool]
    """True if its outputs are :class:`~anomaly_clip.records.Scores`: image scores and maps."""
    transductive: ClassVar[bool] = False
    """True if the score of an image depends on the other images of a test."""
    not_exportable: ClassVar[str | None] = None
    """Reason why there is no program of the method, as a clause such as "scores images by each
    other"; None if it can be exported. A property may depend on the settings."""
    use_of_shots: ClassVar[UseOfShots] = "fit"
    """Use of the few normal images that ``data.shots`` or ``data.fraction`` selects."""
    inference_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may differ from the checkpoint's, because they do not affect any weight."""
    init_only_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that only initialise a fit; a checkpoint overrides them."""

    def __init__(self) -> None:
        super().__init__()
        self.results: Results | None = None
        """Metrics of the last evaluation."""
        self.reference_paths: dict[str, list[str]] = {}
        """Paths of the normal reference images per category."""

    @property
    @abstractmethod
    def weights(self) -> WeightsRecord:
        """Record of the weights that produce the metrics."""

    @property
    @abstractmethod
    def loader_needs(self) -> LoaderNeeds:
        """Requirements on the data loaders."""

    @abstractmethod
    def image_rows(self, outputs: Any, batch: Batch) -> list[dict[str, Any]]:
        """Return one row of ``scores.csv`` for each image.

        Args:
            outputs: Outputs of a step for the batch.
            batch: The batch.
        """

    def final_scores(self) -> dict[int, float]:
        """Return, by image index, those image scores that depend on the whole evaluation."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """Return the method settings to record with the metrics."""
        return {}

    def recorded_protocol(self) -> dict[str, Any]:
        """Return the method settings of :meth:`protocol`, and whether scores are transductive."""
        return {**({"transductive": True} if self.transductive else {}), **self.protocol()}

    def evaluation_protocol(self) -> dict[str, Any]:
        """Return how the metrics were computed; recorded alongside the metrics."""
        return {"fitted": True}

    @property
    def evaluation_note(self) -> str:
        """Suffix of the title of a metrics table."""
        return ""

    @property
    def confusion(self) -> Confusion | None:
        """Confusion matrix of a classifier; None for other modules."""
        return None

    def write_extras(self, folder: Path) -> None:
        """Write any test results other than ``metrics.json`` and ``scores.csv``."""

    @property
    def data(self) -> AnomalyData | None:
        """Data module of the trainer; None if there is none or if it is not of this package."""
        return data_module(self)

    def log_metrics(self, prefix: str, metrics: Mapping[str, float | None]) -> None:
        """Log all metrics that are not None as ``prefix/...``."""
        logged = {f"{prefix}/{name}": v for name, v in metrics.items() if v is not None}
        if self.weights["random"]:
            logged[f"{prefix}/random_weights"] = 1.0  # marks metrics of untrained weights
        self.log_dict(logged, rank_zero_only=True)


def data_module(module: LightningModule) -> AnomalyData | None:
    """Return the trainer's data module; None if there is none or if it is not of this package."""
    if module._trainer is None:
        return None
    data: object = module.trainer.datamodule  # type: ignore[attr-defined]
    return cast("AnomalyData", data) if isinstance(data, _DataModule) else None


def evaluation_loader(trainer: Trainer) -> tuple[DataLoader[Batch], int]:
    """Return the loader of the evaluation that starts, and the number of batches that it scores.

    Args:
        trainer: A trainer that validates, also during a fit, tests or predicts.
    """
    validation = trainer.val_dataloaders, trainer.num_val_batches
    loops: Any = {
        TrainerFn.FITTING: validation,
        TrainerFn.VALIDATING: validation,
        TrainerFn.TESTING: (trainer.test_dataloaders, trainer.num_test_batches),
        TrainerFn.PREDICTING: (trainer.predict_dataloaders, trainer.num_predict_batches),
    }
    loaders, limits = loops[trainer.state.fn]
    loader = loaders[0] if isinstance(loaders, list) else loaders
    if trainer.state.fn == TrainerFn.PREDICTING and loader.batch_sampler is not None:
        # Lightning's batch sampler of predict has one position for all of its iterators.
        sampler = loader.batch_sampler
        loader = DataLoader(
            loader.dataset,
            batch_sampler=BatchSampler(sampler.sampler, sampler.batch_size, sampler.drop_last),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
    return loader, int(limits[0])


def missing_data_module(module: LightningModule, stage: str) -> ValueError:
    """Return the error for a stage that needs a data module of this package.

    Args:
        module: The module, whose trainer has no data module or another one.
        stage: The verb, such as ``test``.
    """
    given = module.trainer.datamodule  # type: ignore[attr-defined]
    name = "none" if given is None else type(given).__name__
    return ValueError(
        f"{type(module).__name__}: {stage} requires a data module of anomaly_clip.data, got "
        f"{name}; pass one as datamodule="
    )


def without_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the tensors of the frozen backbone."""
    return {key: value for key, value in state.items() if not key.startswith("backbone.")}


def check_backbone(
    saved: Mapping[str, Any], saved_identity: str | None, weights: WeightsRecord, identity: str
) -> None:
    """Check that a checkpoint was trained with the current backbone.

    Args:
        saved: Record of the weights in the checkpoint.
        saved_identity: sha256 of the backbone that the checkpoint was trained with.
        weights: Record of the current weights.
        identity: sha256 of the current backbone.

    Raises:
        ValueError: If the checkpoint was trained with a different backbone.
    """
    if saved_identity != identity:
        differs = variant_of(saved) != variant_of(weights)
        options = ", and its backbone.quick_gelu and backbone.positions" if differs else ""
        raise ValueError(
            f"the checkpoint was trained with {saved.get('backbone')} (weights "
            f"{source_of(saved)}, sha256 {str(saved_identity)[:8]}), but the current "
            f"backbone is {weights['backbone']} (weights {source_of(weights)}, sha256 "
            f"{identity[:8]}): use the backbone and weights of the fit{options}"
        )


def reached_limit(checkpoint: Mapping[str, Any], trainer: Trainer) -> str | None:
    """Return the limit of a trainer that the fit of a checkpoint has reached, None without one.

    Args:
        checkpoint: A checkpoint, or its ``loops`` and ``global_step``.
        trainer: The trainer of a fit that resumes from it.
    """
    steps = checkpoint.get("global_step", 0)
    for name, limit, done in (
        ("max_epochs", trainer.max_epochs, _num_epochs(checkpoint)),
        ("max_steps", trainer.max_steps, steps),
    ):
        if limit is not None and 0 < limit <= done:  # -1: no limit
            return f"trainer.{name} is {limit}, and {done} are done"
    return None


def is_exceeded(checkpoint: Mapping[str, Any], trainer: Trainer) -> bool:
    """Return whether a checkpoint has more epochs than a trainer's limit, which Lightning refuses.

    Args:
        checkpoint: See :func:`reached_limit`.
        trainer: See :func:`reached_limit`.
    """
    limit = trainer.max_epochs
    return limit is not None and 0 <= limit < _num_epochs(checkpoint)


def _num_epochs(checkpoint: Mapping[str, Any]) -> int:
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    return 0 if progress is None else int(progress["current"]["processed"])


def frozen_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype to cast frozen weights to for a trainer's precision; None for no cast.

    On a CPU without bf16 instructions, bf16 would be slower: the weights then stay in float32, with
    a warning.
    """
    if not precision.endswith("-mixed"):
        return None
    if device.type == "cpu":
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16
        warnings.warn(
            f"precision {precision}: this CPU has no bf16 instructions, so the frozen backbone "
            f"stays in float32",
            stacklevel=2,
        )
        return None
    return torch.float16 if precision.startswith("16") else torch.bfloat16
