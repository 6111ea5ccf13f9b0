"""Callback that lets an interrupted fit end with its last step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomaly_clip.commands.interruption import (
    Interrupted,
    defer_signals,
    note_signal,
    received_signal,
    take_signals,
)
from anomaly_clip.records import needs_of

__all__ = ["FINITE", "LAST", "LastStep", "last_checkpoint"]

LAST = "last.ckpt"
FINITE = "finite-step-*.ckpt"
"""Last finite states of fits that diverged."""


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the path of ``last.ckpt``, None if the fit keeps no checkpoints."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return Path(str(callback.dirpath)) / LAST


class LastStep(Callback):
    """Finish the training step after a signal, and save it.

    Several processes agree on the step in the exchange that Lightning makes before each step, with
    which it finds out whether process 0 has received SIGTERM. A fit in a single pass stops at once,
    as it has nothing to save, and so do validate, test and predict.
    """

    def _stops_after_a_step(self, trainer: Trainer) -> bool:
        is_alone = trainer.world_size == 1
        agrees = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (is_alone or agrees) and not needs_of(trainer).single_pass

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, see :func:`take_signals`."""
        _take_signals(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning."""
        _take_signals(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning."""
        _take_signals(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning."""
        _take_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning stop after a step; begin the next epoch if one ended at the last save.

        With ``trainer.max_steps``, Lightning would count the ended epoch again, and then draw other
        images than an uninterrupted fit.
        """
        _take_signals(trainer)
        if trainer.world_size > 1 and self._stops_after_a_step(trainer):
            stop = partial(_stop_together, trainer)
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = stop  # type: ignore[method-assign]
        loop = trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        if loop.restarting and epochs.ready == epochs.started == epochs.processed:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
            loop.update_restart_stage()
            if epochs.completed < epochs.processed:
                loop.epoch_progress.increment_completed()
        defer_signals(self._stops_after_a_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once from now on."""
        defer_signals(False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the last step if Lightning stopped after one."""
        defer_signals(False)
        file = last_checkpoint(trainer)
        stopped = isinstance(exception, SystemExit) and not isinstance(exception, Interrupted)
        if not stopped or not self._stops_after_a_step(trainer) or not trainer.global_step:
            return
        at_end = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if file is not None and (at_end or not needs_of(trainer).whole_epochs):
            trainer.save_checkpoint(file)


def _take_signals(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        take_signals()


def _stop_together(trainer: Trainer) -> None:
    """Stop all processes before the same batch if one of them has received a signal.

    This takes the place of Lightning's exchange, and costs the same: one number.

    Raises:
        SIGTERMException: If a process has received a signal; not while gradients are accumulated.
    """
    number = torch.tensor([received_signal() or 0], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    if number.item() and trainer.fit_loop.epoch_loop._accumulated_batches_reached():
        note_signal(int(number.item()))
        raise SIGTERMException
