"""How much of its time a training waits for images."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["WaitingShare"]


class WaitingShare(Callback):
    """Log the share of the time that the loop waits for batches, as ``train/waiting``.

    The first batch of an epoch, before which processes start, is left out.
    """

    def __init__(self) -> None:
        self.waited = self.worked = 0.0
        self._begun = self._ended = 0.0

    @property
    def share(self) -> float:
        """Waiting over all, so far in this epoch; 0 before two batches were seen."""
        total = self.waited + self.worked
        return self.waited / total if total else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.waited = self.worked = self._ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Note how long the batch took to come."""
        self._begun = time.perf_counter()
        if self._ended:
            self.waited += self._begun - self._ended

    def on_train_batch_end(self, *_: Any) -> None:
        """Note how long the step took."""
        now = time.perf_counter()
        if self._ended:
            self.worked += now - self._begun
        self._ended = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's share."""
        pl_module.log("train/waiting", self.share, sync_dist=True)
