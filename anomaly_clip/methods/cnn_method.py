"""Base classes of the detectors that judge the features of a frozen CNN."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.errors import check_at_least
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import without_backbone
from anomaly_clip.metrics.evaluator import EvaluatorSettings, Results
from anomaly_clip.records import LoaderNeeds

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["CNNMethod", "FittedMethod", "Select", "TrainedMethod"]

Select = Literal["last", "best_test"]
"""Which epoch is tested."""


class CNNMethod(AnomalyMethod, ABC):
    """A method on a frozen CNN, one model a category.

    Args:
        backbone: The CNN.
        layers: The layers that are read.
        image_size: Side of its square images, in pixels.
        evaluator: How figures are computed.
    """

    must_be_fitted: ClassVar[bool] = True
    can_be_fitted: ClassVar[bool] = True
    one_category: ClassVar[bool] = True
    backbone: CNNBackbone

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone,
        layers: Sequence[str],
        image_size: int,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(evaluator)
        check_at_least("model.image_size", image_size, 32)
        if isinstance(backbone, CNNBackbone):
            self.asked_backbone = backbone.settings
            self.backbone = backbone
        else:
            # Plain dictionaries come from checkpoints.
            settings = backbone if isinstance(backbone, CNNSettings) else CNNSettings(**backbone)
            self.asked_backbone = settings
            # What follows the last layer is not computed.
            self.backbone = CNNBackbone.of(
                replace(settings, layers=settings.layers or list(layers))
            )
        self._image_size = image_size

    @property
    def image_size(self) -> int:
        """Side of the square images that ``score`` takes, in pixels."""
        return self._image_size

    def check_layers(self, layers: Sequence[str]) -> list[str]:
        """Return the layers to use.

        Raises:
            ValueError: If the backbone hands one of them out not, or without positions.
        """
        available = list(self.backbone.strides)
        unknown = [layer for layer in layers if layer not in available]
        if unknown or not layers:
            raise ValueError(
                f"model.layers {list(layers)}: expected some of those of the backbone "
                f"({', '.join(available)})"
            )
        strides = [self.backbone.strides[layer] for layer in layers]
        if strides != sorted(strides):
            raise ValueError(f"model.layers {list(layers)}: expected the finest first")
        return list(layers)

    def check_normal_only(self, data: AnomalyData) -> None:
        """Check that a fit gets normal images alone.

        Raises:
            ValueError: If there are defects among them.
        """
        synthetic = data.synthesis is not None and data.synthesis.share > 0
        for key, given in (("synthesis", synthetic), ("auxiliary", data.auxiliary is not None)):
            if given:
                raise ValueError(
                    f"{type(self).__name__} looks at normal images alone: leave out data.{key}"
                )


class TrainedMethod(CNNMethod, ABC):
    """A method that trains networks of its own on normal images, epoch by epoch.

    Args:
        backbone: The CNN.
        layers: The layers that are read.
        image_size: Side of its square images, in pixels.
        select: last: the last epoch is tested. best_test: the epoch whose figures on the test
            images are best, as the public code does: such figures are too good, and say so.
        evaluator: How figures are computed.
    """

    trained: Tensor

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone,
        layers: Sequence[str],
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
        """Return what is highest at the epoch that is selected; None if it is undefined."""
        return results["mean"]["image_auroc"]

    def setup(self, stage: str) -> None:
        """Check that a fit gets what it needs; see the base.

        Raises:
            ValueError: If there are defects among the training images, or epochs are to be
                selected on test images that are not looked at.
        """
        super().setup(stage)
        if stage != "fit" or self.data is None:
            return
        self.check_normal_only(self.data)
        if self.select == "best_test" and not self.data.validation.is_test:
            raise ValueError(
                "model.select best_test chooses the epoch by the test images: set data.val_split "
                "to test, or model.select to last"
            )

    def on_fit_start(self) -> None:
        """Note that what is scored from now on is not where a training starts from."""
        self.trained.fill_(True)

    def check_trained(self) -> None:
        """Check that there was a training.

        Raises:
            ValueError: If nothing was fitted, or loaded.
        """
        if not self.trained:
            raise ValueError(f"{type(self).__name__} must be fitted first, or loaded")

    def on_validation_epoch_end(self) -> None:
        """Compute the figures, and keep the state that they are best of, if that is asked for."""
        super().on_validation_epoch_end()
        if self.select != "best_test" or self.trainer.state.stage != RunningStage.VALIDATING:
            return
        assert self.results is not None
        merit = self.merit(self.results)
        if merit is not None and (self._best is None or merit > self._best["merit"]):
            kept = without_backbone(self.state_dict())
            state = {key: value.detach().cpu().clone() for key, value in kept.items()}
            self._best = {"epoch": self.current_epoch, "merit": merit, "state": state}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best state; see the base."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the best state, or, to go on training, the last; see the base."""
        self._best = checkpoint.get("best")
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self._best is not None and not fitting:
            checkpoint["state_dict"] = dict(self._best["state"])
            self._chosen = self._best["epoch"] + 1
        super().on_load_checkpoint(checkpoint)

    def protocol(self) -> dict[str, Any]:
        """Return which epoch is used, and whether test images chose it; see the base.

        Only a checkpoint brings the chosen epoch; right after a fit it is the last that is tested.
        """
        select = self.select if self._chosen is not None else "last"
        return {"select": select, "selected_epoch": self._chosen}


class FittedMethod(CNNMethod, ABC):
    """A method that looks once at all normal images and follows no gradient.

    Its state are buffers whose sizes are known after that; a checkpoint brings its own.
    """

    fitted_buffers: ClassVar[tuple[str, ...]]
    """Names of the buffers that hold what was fitted."""

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone,
        layers: Sequence[str],
        image_size: int,
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.automatic_optimization = False
        # DDP refuses a module without anything to train.
        self.unused = nn.Parameter(torch.zeros(()))
        for name in self.fitted_buffers:
            self.register_buffer(name, torch.empty(0))

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders: every image once."""
        return LoaderNeeds(self.image_size, single_pass=True)

    def setup(self, stage: str) -> None:
        """Check that one look at normal images is all that is asked for; see the base.

        Raises:
            ValueError: If there are defects among them, a validation, or more epochs than one.
        """
        super().setup(stage)
        name, data = type(self).__name__, self.data
        if stage == "fit" and data is not None:
            self.check_normal_only(data)
            if data.validation.exists:
                raise ValueError(
                    f"{name} is fitted when it has seen all images, so nothing can be validated "
                    f"before: set data.val_split to none"
                )
        epochs = self.trainer.max_epochs
        if stage == "fit" and epochs != 1:
            raise ValueError(
                f"{name} looks once at each image: set trainer.max_epochs to 1, not {epochs}"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was fitted; see the base."""
        super().on_load_checkpoint(checkpoint)
        for name in self.fitted_buffers:
            saved = checkpoint["state_dict"][name]
            setattr(self, name, torch.empty_like(saved, device=self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one that is never used."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def check_fitted(self) -> None:
        """Check that there is something to compare with.

        Raises:
            ValueError: If nothing was fitted, or loaded.
        """
        if not getattr(self, self.fitted_buffers[0]).numel():
            raise ValueError(f"{type(self).__name__} must be fitted first, or loaded")

    def keep(self, **fitted: Tensor) -> None:
        """Keep what was fitted; floating numbers in the method's type, in float32 at least."""
        for name, value in fitted.items():
            kind = torch.promote_types(getattr(self, name).dtype, torch.float32)
            setattr(self, name, value.to(kind) if value.is_floating_point() else value)
