"""Callback that kills the process in the fit of one category, as the system does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Killed(Callback):
    """Kill the process at the start of a fit, once.

    Args:
        category: The category of the fit.
        marker: File that is created before, and without which no other process is killed.
    """

    def __init__(self, category: str, marker: str) -> None:
        self.category = category
        self.marker = Path(marker)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End without a message."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.categories == [self.category] and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
