"""TAB's optimiser and its learning rate schedule; see docs/methods/tab.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.schedules import half_cosine

__all__ = ["TABOptim"]


@dataclass(frozen=True)
class TABOptim:
    """Optimiser and schedule of TAB.

    Args:
        name: sgd with momentum 0.9; or adamw with betas 0.5 and 0.999, the authors' choice for the
            classification baseline.
        lr: Initial learning rate.
        passes: Number of passes through the data in one epoch of the paper. An epoch of the trainer
            is a single pass.
        scheduler_t_max: epochs: cosine decay to 0 at the end. official: the mistake of the authors'
            code, which steps the cosine once per epoch, although its length is the number of
            optimiser steps in an epoch. none: constant learning rate.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    passes: int = 3
    scheduler_t_max: Literal["epochs", "official", "none"] = "epochs"

    def __post_init__(self) -> None:
        check_above("model.optim.lr", self.lr, 0)
        check_at_least("model.optim.passes", self.passes, 1)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the parameters."""
        if self.name == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=0.9)
        return torch.optim.AdamW(parameters, self.lr, betas=(0.5, 0.999))

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LambdaLR:
        """Return the learning rate schedule, stepped once per epoch of the trainer.

        Args:
            optimizer: Optimiser to schedule.
            steps: Number of optimiser steps in the whole training.
            epochs: Number of epochs of the trainer, each a single pass through the data.
        """
        length = max(1, epochs // self.passes)
        if self.scheduler_t_max == "official":
            length = max(1, steps // length)
        return LambdaLR(
            optimizer, lambda epoch: half_cosine(math.pi * (epoch // self.passes) / length)
        )
