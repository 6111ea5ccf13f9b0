"""A callback that compares the processes of a distributed fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Compared(Callback):
    """Write the samples that each process trained on, and whether all have equal final weights.

    Args:
        file: The JSON file to write.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        """Record the samples."""
        self.rows += rest[0]["index"].tolist()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights of all processes."""
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, (self.rows, weights))
        if trainer.is_global_zero:
            equal = all(weights.equal(gathered[0][1]) for _, weights in gathered)
            rows = [rows for rows, _ in gathered]
            self.file.write_text(json.dumps({"equal": equal, "rows": rows}), encoding="utf-8")


class FixedStatistics(Callback):
    """Keep BatchNorm in evaluation mode, so that an image's features do not depend on its batch."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        """Set the mode, which a validation resets."""
        for layer in module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.eval()
