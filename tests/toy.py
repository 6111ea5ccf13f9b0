"""A trainable method for tests of the command line."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.methods.clip_method import CLIPMethod
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

DEFAULTS = EvaluatorSettings()


class Toy(CLIPMethod):
    """Method that scores mean brightness plus one trained offset."""

    must_be_fitted: ClassVar[bool] = True
    can_be_fitted: ClassVar[bool] = True

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        lr: float = 0.5,
        evaluator: EvaluatorSettings = DEFAULTS,
    ) -> None:
        super().__init__(evaluator)
        self.backbone = CLIPBackbone.of(backbone)
        self.lr = lr
        self.offset = nn.Parameter(torch.zeros(()))
        self.save_hyperparameters(ignore=["backbone"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return (self.score(batch["image"], batch["category"])["image_score"] - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.offset], lr=self.lr)

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        maps = images.float().mean(dim=1) / 255 + self.offset
        return Scores(image_score=maps.flatten(1).mean(dim=1), anomaly_map=maps)


class StopAfterOneEpoch(Callback):
    """Stop a fit after one epoch, like an interruption between two epochs."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True
