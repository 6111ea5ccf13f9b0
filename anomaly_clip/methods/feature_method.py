"""Base classes of the detectors that score feature maps of a frozen backbone."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.required_kinds import check_resnet, cnn_settings_of
from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, settings_of, tower_of
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.errors import Diverged, check_at_least
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import without_backbone
from anomaly_clip.metric_values import Results
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.metrics.image import is_finite
from anomaly_clip.records import LoaderNeeds

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = [
    "FeatureMethod",
    "FittedMethod",
    "Select",
    "TrainedMethod",
    "chosen_layers",
    "feature_sums",
    "in_order",
]

QUARTERS = {"layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
"""Names of a ResNet's stages, and the quarters of a transformer that they stand for."""
COPIES_AT_ONCE = 16
"""Rotated copies that are encoded together without a data module."""
Select = Literal["last", "best_test"]
"""Epoch that is tested: the last one, or the best on the test images."""


class FeatureMethod(AnomalyMethod, ABC):
    """A method on feature maps of a frozen backbone, with one model per category.

    Args:
        backbone: The image tower: a CNN or, if ``any_tower`` is set, also a ViT or a CLIP model.
        layers: Layers whose features the method uses; None: those of ``stages``.
        image_size: Side of the square input images, in pixels.
        evaluator: Settings of the metrics.

    Raises:
        ValueError: If the method cannot use such a backbone.
    """

    must_be_fitted: ClassVar[bool] = True
    can_be_fitted: ClassVar[bool] = True
    one_category: ClassVar[bool] = True
    any_tower: ClassVar[bool] = False
    """True if the method takes the feature maps of any backbone, not only those of a CNN."""
    needs_stages: ClassVar[str] = "it is written for the layers of one"
    """Reason why a method without ``any_tower`` needs a CNN, for messages."""
    trains_resnet: ClassVar[bool] = False
    """True if a method without ``any_tower`` takes no other CNN than a ResNet."""
    stages: ClassVar[tuple[str, ...]] = ()
    """Default layers, as names of a ResNet's stages; see :meth:`check_layers`."""
    backbone: AnyBackbone

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone | Mapping[str, Any],
        layers: Sequence[str] | Sequence[int] | None,
        image_size: int,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(evaluator)
        check_at_least("model.image_size", image_size, 32)
        if self.any_tower:
            self.backbone_settings = settings_of(backbone)
        else:
            method = type(self).__name__
            reason = "it trains a ResNet" if self.trains_resnet else self.needs_stages
            self.backbone_settings = cnn_settings_of(backbone, method, reason)
            if self.trains_resnet:
                check_resnet(backbone, method)
        settings = self.backbone_settings
        ready = isinstance(backbone, (CNNBackbone, ViTBackbone, CLIPBackbone))
        needed = self.stages if layers is None else layers
        self.backbone = tower_of(backbone if ready else settings, needed, image_size)
        self._image_size = image_size

    @property
    def image_size(self) -> int:
        """Side of the square images that ``score`` takes, in pixels."""
        return self._image_size

    def default_blocks(self, num_blocks: int) -> Sequence[int] | Sequence[str]:
        """Return the blocks of a transformer that are used by default; see ``stages``."""
        return self.stages

    def check_layers(self, layers: Sequence[str] | Sequence[int] | None) -> list[Any]:
        """Return the layers as a list, after checking that the method can use them.

        Args:
            layers: Names of a CNN's layers, or 1-based numbers of blocks; ``layer1`` to ``layer4``
                of a transformer are the last blocks of its quarters (ours). None: the default.

        Raises:
            ValueError: If no layer is given, a layer is not spatial or not exposed by the backbone,
                or the layers are not ordered from fine to coarse.
        """
        return chosen_layers(self.backbone, layers, self.stages, self.default_blocks)

    def plain_settings(self, layers: Sequence[str] | Sequence[int] | None) -> dict[str, Any]:
        """Return the arguments ``backbone`` and ``layers`` as plain values, for checkpoints."""
        given = None if layers is None else list(layers)
        return {"backbone": asdict(self.backbone_settings), "layers": given}

    def check_normal_only(self, data: AnomalyData) -> None:
        """Check that the training data consists of normal images only.

        Raises:
            ValueError: If synthetic defects or auxiliary data are configured.
        """
        synthetic = data.synthesis is not None and data.synthesis.share > 0
        for key, given in (("synthesis", synthetic), ("auxiliary", data.auxiliary is not None)):
            if given:
                raise ValueError(
                    f"{type(self).__name__} trains on normal images only: leave out data.{key}"
                )


class TrainedMethod(FeatureMethod, ABC):
    """A method that trains its own networks on normal images for several epochs.

    Args:
        backbone: The image tower.
        layers: Layers whose features the method uses.
        image_size: Side of the square input images, in pixels.
        select: last: test the last epoch. best_test: test the epoch with the best metrics on the
            test images, as the public code does: the highest :meth:`merit` and, among equal ones,
            the highest :meth:`tie_breaker`. Its metrics are too optimistic, so the results record
            how the epoch was selected.
        evaluator: Settings of the metrics.
    """

    trained: Tensor

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone | Mapping[str, Any],
        layers: Sequence[str] | Sequence[int] | None,
        image_size: int,
        select: Select,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.select = select
        self._best: dict[str, Any] | None = None
        self._chosen: int | None = None
        self.register_buffer("trained", torch.tensor(False))

    def merit(self, results: Results) -> float | None:
        """Return the value to maximise when selecting an epoch, None if it is undefined."""
        return results["mean"]["image_auroc"]

    def tie_breaker(self, results: Results) -> float | None:
        """Return the value to maximise among epochs of equal merit, None if it is undefined.

        The first of epochs that are equal in both values is selected.
        """
        return results["mean"].get("pixel_auroc")

    def setup(self, stage: str) -> None:
        """Check the data of a fit; see the base class.

        Raises:
            ValueError: If synthetic defects or auxiliary data are configured, or if ``best_test``
                is set but the fit does not evaluate the test images.
        """
        super().setup(stage)
        if stage != "fit" or self.data is None:
            return
        self.check_normal_only(self.data)
        if self.select == "best_test" and not self.data.validation.is_test:
            raise ValueError(
                f"model.select best_test selects the epoch on the test images, which "
                f"data.val_split {self.data.val_split} does not evaluate: set data.val_split to "
                f"test, or model.select to last"
            )

    def on_fit_start(self) -> None:
        """Mark the networks as trained, so that they may score images."""
        self.trained.fill_(True)

    def check_trained(self) -> None:
        """Check that the networks were trained.

        Raises:
            ValueError: If the method was neither fitted nor loaded from a checkpoint.
        """
        # The values of tensors are unknown while a graph is traced.
        if not torch.compiler.is_compiling() and not self.trained:
            raise ValueError(
                f"{type(self).__name__} must be fitted first, or loaded from a checkpoint"
            )

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics and, for ``best_test``, keep the best epoch's state."""
        super().on_validation_epoch_end()
        if self.select != "best_test" or not self.is_candidate:
            return
        assert self.results is not None
        merit, tie_breaker = self.merit(self.results), self.tie_breaker(self.results)
        if merit is not None and self._is_better(merit, tie_breaker):
            kept = without_backbone(self.state_dict())
            state = {key: value.detach().cpu().clone() for key, value in kept.items()}
            untrained = self.trainer.state.stage == RunningStage.SANITY_CHECKING
            epoch = -1 if untrained else self.current_epoch
            best = {"epoch": epoch, "merit": merit, "tie_breaker": tie_breaker, "state": state}
            self._best = best

    @property
    def is_candidate(self) -> bool:
        """True if the state that is being validated may be selected: after each epoch."""
        return self.trainer.state.stage == RunningStage.VALIDATING

    def _is_better(self, merit: float, tie_breaker: float | None) -> bool:
        best = self._best
        if best is None or merit != best["merit"]:
            return best is None or merit > best["merit"]
        highest = best.get("tie_breaker")  # checkpoints of 0.1.0 have none: the first epoch stays
        return highest is not None and tie_breaker is not None and tie_breaker > highest

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the best epoch; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the state of the best epoch, or of the last to resume a fit; see the base class."""
        self._best = checkpoint.get("best")
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self._best is not None and not fitting:
            checkpoint["state_dict"] = dict(self._best["state"])
            self._chosen = self._best["epoch"] + 1
        super().on_load_checkpoint(checkpoint)

    def protocol(self) -> dict[str, Any]:
        """Return the tested epoch and how it was selected; see the base class.

        The selected epoch is only restored when a checkpoint is loaded. A test that follows a fit
        without loading one uses the last epoch.
        """
        select = self.select if self._chosen is not None else "last"
        return {"select": select, "selected_epoch": self._chosen}


def chosen_layers(
    tower: AnyBackbone,
    layers: Sequence[str] | Sequence[int] | None,
    stages: Sequence[str],
    default_blocks: Callable[[int], Sequence[int] | Sequence[str]],
) -> list[Any]:
    """Return the layers of a tower as a list; see :meth:`FeatureMethod.check_layers`.

    Args:
        tower: The backbone.
        layers: The choice of the user; None: the default.
        stages: Default layers of a CNN.
        default_blocks: Function that returns the default blocks of a transformer of a given number
            of blocks.
    """
    if isinstance(tower, CNNBackbone):
        return tower.check_layers([str(name) for name in (stages if layers is None else layers)])
    blocks = default_blocks(tower.num_layers) if layers is None else layers
    quarters = {name: tower.num_layers * number // 4 for name, number in QUARTERS.items()}
    ends: dict[Any, int] = {name: max(1, block) for name, block in quarters.items()}
    numbers: list[Any] = [ends.get(layer, layer) for layer in blocks]
    if all(layer in ends for layer in blocks):  # quarters of fewer than four blocks coincide
        numbers = list(dict.fromkeys(numbers))
    return tower.check_layers(numbers)


def feature_sums(features: Tensor) -> Tensor:
    """Return the sum ``(B,)`` of each image's features ``(B, ...)``: finite if all of them are."""
    dims = tuple(range(1, features.ndim))
    return features.detach().sum(dim=dims, dtype=torch.promote_types(features.dtype, torch.float32))


class FittedMethod(FeatureMethod, ABC):
    """A method that is fitted in one pass over all normal images, without gradients.

    A training step returns the :func:`feature_sums` of its images as ``features``. The command line
    checks that they are finite.

    The fitted state is stored in buffers whose sizes are known only after the fit. When a
    checkpoint is loaded, the buffers take the sizes stored in it.
    """

    fitted_buffers: ClassVar[tuple[str, ...]]
    """Names of the buffers that hold the fitted state."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone | Mapping[str, Any],
        layers: Sequence[str] | Sequence[int] | None,
        image_size: int,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.automatic_optimization = False
        # DDP refuses a module without trainable parameters.
        self.unused = nn.Parameter(torch.zeros(()))
        for name in self.fitted_buffers:
            self.register_buffer(name, torch.empty(0))

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Loader requirements: a single pass, in which every image occurs once."""
        return replace(super().loader_needs, single_pass=True)

    def setup(self, stage: str) -> None:
        """Check that the fit is a single pass over normal images; see the base class.

        Raises:
            ValueError: If synthetic defects, auxiliary data or a validation split are configured,
                or if the number of epochs is not 1.
        """
        super().setup(stage)
        name, data = type(self).__name__, self.data
        if stage == "fit" and data is not None:
            self.check_normal_only(data)
            if data.validation.exists:
                raise ValueError(
                    f"{name} is only fitted after a pass over all images, so it cannot be "
                    f"validated during the fit: set data.val_split to none, not {data.val_split}"
                )
        epochs = self.trainer.max_epochs
        if stage == "fit" and epochs != 1:
            raise ValueError(
                f"{name} is fitted in a single pass: set trainer.max_epochs to 1, not {epochs}"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Allocate the buffers with the checkpoint's sizes; see the base class.

        Raises:
            ValueError: If a fit would resume, and so keep what was fitted before.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"{type(self).__name__} is fitted in a single pass, which cannot be resumed: leave "
                f"ckpt_path out to fit anew, not {self.trainer.ckpt_path}"
            )
        super().on_load_checkpoint(checkpoint)
        for name in self.fitted_buffers:
            saved = checkpoint["state_dict"][name]
            setattr(self, name, torch.empty_like(saved, device=self.device))

    @property
    def copies_at_once(self) -> int:
        """Number of rotated copies that are encoded together: the batch size of the data."""
        return COPIES_AT_ONCE if self.data is None else self.data.batch_size

    def gathered(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """Return the patches ``(M, C)`` of all processes, ordered by image; None but on the first.

        Args:
            parts: Those of this process: image indices ``(n,)`` and patches ``(n, N, C)``. Parts
                are removed one by one, so that they are not all in memory with the result.
        """
        if self.trainer.world_size == 1:
            return in_order(parts)
        leads = self.trainer.is_global_zero
        of_all: list[Any] | None = [None] * self.trainer.world_size if leads else None
        torch.distributed.gather_object(parts, of_all)
        parts.clear()
        return None if of_all is None else in_order([part for rank in of_all for part in rank])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimiser that is never used."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def check_fitted(self) -> None:
        """Check that the method was fitted.

        Raises:
            ValueError: If the method was neither fitted nor loaded from a checkpoint.
        """
        if not getattr(self, self.fitted_buffers[0]).numel():
            raise ValueError(
                f"{type(self).__name__} must be fitted first, or loaded from a checkpoint"
            )

    def check_finite(self, **fitted: Tensor) -> None:
        """Check the fitted tensors.

        Raises:
            Diverged: If a value is NaN or infinite.
        """
        for name, value in fitted.items():
            if value.numel() and not is_finite(value):
                raise Diverged(
                    f"the fitted {name} of {type(self).__name__} is NaN or infinite, as are the "
                    f"features of some training images: give other backbone weights, or set "
                    f"trainer.precision 32-true"
                )

    def keep(self, **fitted: Tensor) -> None:
        """Store the fitted tensors in their buffers.

        A floating-point tensor takes the dtype of its buffer, or float32 if that is wider.

        Raises:
            Diverged: If a value is NaN or infinite.
        """
        self.check_finite(**fitted)
        for name, value in fitted.items():
            dtype = torch.promote_types(getattr(self, name).dtype, torch.float32)
            setattr(self, name, value.to(dtype) if value.is_floating_point() else value)


def in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the patches ``(M, C)`` of all images, ordered by image index.

    Each part consists of image indices ``(n,)`` and patches ``(n, N, C)``. Parts are removed from
    the list one by one, so that they are not all in memory together with the result.
    """
    place = torch.cat([index for index, _ in parts]).argsort().argsort()
    ends = torch.tensor([len(index) for index, _ in parts]).cumsum(0).tolist()
    ordered = torch.empty(len(place), *parts[0][1].shape[1:], dtype=parts[0][1].dtype)
    while parts:
        _, features = parts.pop()
        end = ends.pop()
        ordered[place[end - len(features) : end]] = features
    return ordered.flatten(0, 1)  # (M, C)
