"""Optimiser of the linear probe: SGD with a cosine schedule.

This is our choice, as the paper names no optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import CosineAnnealingLR

from anomaly_clip.errors import check_above, check_at_least, check_between
from anomaly_clip.schedules import total_steps

__all__ = ["ProbeOptim"]

LR = {True: 0.1, False: 0.01}
WEIGHT_DECAY = {True: 0.0, False: 1e-4}
"""Defaults of ``lr`` and ``weight_decay`` for a frozen (True) and a trained backbone (False)."""


@dataclass(frozen=True)
class ProbeOptim:
    """Settings of SGD and of its learning rate schedule.

    Args:
        lr: Initial learning rate; null: 0.1 for a frozen backbone, else 0.01.
        momentum: Momentum of SGD.
        weight_decay: Weight decay; null: 0 for a frozen backbone, else 1e-4.
        schedule: cosine: decay to 0 at the last step. none: constant learning rate.
    """

    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: Literal["cosine", "none"] = "cosine"

    def __post_init__(self) -> None:
        if self.lr is not None:
            check_above("model.optim.lr", self.lr, 0)
        check_between("model.optim.momentum", self.momentum, 0, 1, open_high=True)
        if self.weight_decay is not None:
            check_at_least("model.optim.weight_decay", self.weight_decay, 0)

    def of(self, frozen: bool) -> ProbeOptim:
        """Return the settings with nulls replaced by their defaults."""
        lr = LR[frozen] if self.lr is None else self.lr
        decay = WEIGHT_DECAY[frozen] if self.weight_decay is None else self.weight_decay
        return replace(self, lr=lr, weight_decay=decay)

    def build(self, module: LightningModule) -> Any:
        """Return the optimiser of a module's trainable parameters, with its schedule if any.

        Raises:
            ValueError: If the length of the training is unknown.
        """
        assert self.lr is not None
        assert self.weight_decay is not None
        optimizer = torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad],
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
        )
        if self.schedule == "none":
            return optimizer
        steps = total_steps(module, ", or set model.optim.schedule to none")
        schedule = CosineAnnealingLR(optimizer, max(1, steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
