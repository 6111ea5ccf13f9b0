"""A callback that interrupts one process of a fit."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, Trainer


class Interrupting(Callback):
    """Send a signal to one process at the start of a batch.

    Args:
        name: The signal.
        at: Number of the batch, counted from 1.
        rank: The process.
    """

    def __init__(self, name: str, at: int, rank: int = 0) -> None:
        self.name = name
        self.at = at
        self.rank = rank
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Count the batches of a fit."""
        self._count(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Count the batches of a test."""
        self._count(trainer)

    def _count(self, trainer: Trainer) -> None:
        self.batches += 1
        if (trainer.global_rank, self.batches) == (self.rank, self.at):
            os.kill(os.getpid(), signal.Signals[self.name])
