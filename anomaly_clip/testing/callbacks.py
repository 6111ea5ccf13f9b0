"""Callbacks that disturb a fit, for the checks of what survives it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomaly_clip.records import needs_of

__all__ = [
    "CompareProcesses",
    "DisturbRandomStates",
    "SignalAtStep",
    "SpoilParameter",
    "StopAfterEpoch",
]


class StopAfterEpoch(Callback):
    """Stop a fit after its first epoch, although its limits allow more."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning stop."""
        trainer.should_stop = True


class DisturbRandomStates(Callback):
    """Seed all global generators differently before each batch."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        seed = 1000 + trainer.fit_loop.total_batch_idx
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)


class SignalAtStep(Callback):
    """Send a signal to this process before a batch.

    Args:
        number: The signal.
        epoch: Epoch of the batch, from 0.
        batch: Number of the batch in the epoch, from 0.
    """

    def __init__(self, number: int = signal.SIGTERM, epoch: int = 1, batch: int = 0) -> None:
        self.number = number
        self.epoch = epoch
        self.batch = batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Send the signal."""
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), self.number)


class SpoilParameter(Callback):
    """Set the first trained parameter to NaN before the second batch of a fit."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set it."""
        if trainer.fit_loop.total_batch_idx == 1:
            trained = (p for p in pl_module.parameters() if p.requires_grad)
            next(trained).data.fill_(torch.nan)


class CompareProcesses(Callback):
    """End a fit in several processes with an error unless all have the same model."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare parameters and, of a fit in a single pass, buffers.

        Statistics of BatchNorm are those of each process until the first process's are saved.

        Raises:
            RuntimeError: If the processes differ.
        """
        tensors: dict[str, torch.Tensor] = {**dict(pl_module.named_parameters())}
        if needs_of(trainer).single_pass:
            tensors |= dict(pl_module.named_buffers())
        mine = {name: _hashed(value) for name, value in tensors.items()}
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, mine)
        for name, digest in mine.items():
            if any(others[name] != digest for others in gathered):
                raise RuntimeError(f"{name} differs between the processes")


def _hashed(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's values."""
    # NumPy has no bfloat16, but its bytes.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
