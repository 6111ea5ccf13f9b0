"""Callback that lets an interrupted fit end with its last step."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop

from anomaly_clip.commands.interruption import Interrupted, defer_signals
from anomaly_clip.records import needs_of

__all__ = ["LAST", "LastStep", "last_checkpoint"]

LAST = "last.ckpt"


def last_checkpoint(trainer: Trainer) -> Path | None:
    """Return the path of ``last.ckpt``, None if the fit keeps no checkpoints."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return Path(str(callback.dirpath)) / LAST


class LastStep(Callback):
    """Finish the training step after a signal, and save it.

    A fit in a single pass stops at once, as does one in several processes: it has nothing to save,
    or might wait for the others.
    """

    def _stops_after_a_step(self, trainer: Trainer) -> bool:
        return not needs_of(trainer).single_pass and trainer.world_size == 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let Lightning stop after a step; begin the next epoch if one ended at the last save.

        With ``trainer.max_steps``, Lightning would count the ended epoch again, and then draw other
        images than an uninterrupted fit.
        """
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
            loop.update_restart_stage()
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
