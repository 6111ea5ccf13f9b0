"""Callbacks that compare the processes of a distributed fit, or make one of them fail."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional as sums
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anomaly_clip.errors import UserError


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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the mode of all layers."""
        for layer in pl_module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()


class SharedStatistics(Callback):
    """Compute the statistics of BatchNorm over the images of all processes, as SyncBatchNorm does.

    SyncBatchNorm itself refuses tensors on the CPU.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the forward pass of all layers that are trained."""
        for layer in pl_module.modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                layer.forward = partial(_normalized, layer)  # type: ignore[method-assign]


def _normalized(layer: Any, x: Tensor) -> Tensor:
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    count = x.numel() / x.shape[1]
    total = torch.stack([x.double().sum(dims), x.double().square().sum(dims)])  # (2, C)
    if torch.distributed.is_initialized():
        total = sums.all_reduce(total)
        count *= torch.distributed.get_world_size()
    mean, var = total[0] / count, total[1] / count - (total[0] / count).square()
    with torch.no_grad():
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean.float(), layer.momentum)
        layer.running_var.lerp_((var * count / (count - 1)).float(), layer.momentum)
    scale = layer.weight / (var + layer.eps).sqrt().float()
    return (x - mean.float().view(shape)) * scale.view(shape) + layer.bias.view(shape)


class Failing(Callback):
    """Make one process fail at its second batch.

    Args:
        rank: The process.
        how: Class of the error, the name of a signal that the process sends to itself, or NaN for
            images without finite values.
    """

    def __init__(self, rank: int, how: str) -> None:
        self.rank = rank
        self.how = how
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Fail in a fit."""
        if self.how == "NaN":
            batch = arguments[1]
            if trainer.global_rank == self.rank:
                batch["image"] = torch.full(batch["image"].shape, float("nan"))
            return
        self._count(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Fail in a test."""
        self._count(trainer)

    def _count(self, trainer: Trainer) -> None:
        self.batches += 1
        if trainer.global_rank != self.rank or self.batches != 2:
            return
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.how])
        if self.how == "OSError":
            raise OSError(28, "No space left on device", "runs/scores.csv")
        kinds = {"RuntimeError": RuntimeError, "ValueError": ValueError, "UserError": UserError}
        raise kinds[self.how]("the cause")
