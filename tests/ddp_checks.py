"""A callback with which tests of several processes compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Compared(Callback):
    """Write which samples each process trained on, and whether all ended with the same weights.

    Args:
        file: Where to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        """Note the samples."""
        self.rows += rest[0]["index"].tolist()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, (self.rows, weights))
        if trainer.is_global_zero:
            equal = all(weights.equal(found[0][1]) for _, weights in found)
            rows = [rows for rows, _ in found]
            self.file.write_text(json.dumps({"equal": equal, "rows": rows}), encoding="utf-8")
