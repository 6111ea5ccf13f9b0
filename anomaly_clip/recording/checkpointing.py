"""Callback that saves ``last.ckpt`` after each epoch or validation, or every so many steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from anomaly_clip.errors import check_at_least
from anomaly_clip.progress import say
from anomaly_clip.records import needs_of

__all__ = ["LastCheckpoint", "last_checkpoint_of"]

OPTION = "output.checkpoint_every_n_steps"
LAST = "last"
"""Name of the checkpoint without its suffix."""
LONGEST = 300.0
"""Seconds between two saves of a fit in one process, if it saves every so many steps."""


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``: the state at the end of an epoch or validation, or every so many steps.

    A method whose fits can be resumed only from the end of an epoch is saved there, at the first
    end of an epoch after each number of steps. With a number of steps, a fit in one process also
    saves when the last save is five minutes old, as steps may be slow; several processes would not
    agree on the time.

    Args:
        every_n_steps: Steps between two saves, counted as ``trainer.max_steps`` counts them; None:
            save after each epoch or validation.
        clock: Returns the time in seconds.

    Raises:
        ValueError: If the number of steps is below 1.
    """

    def __init__(
        self, every_n_steps: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if every_n_steps is not None:
            check_at_least(OPTION, every_n_steps, 1)
        super().__init__(filename=LAST, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self._clock = clock
        self._saved_at = clock()

    @property
    def state_key(self) -> str:
        """Key of Lightning's own class, so that checkpoints fit any number of steps."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def _save_if_due(self, trainer: Trainer) -> None:
        assert self.every_n_steps is not None
        saved = self._last_global_step_saved // self.every_n_steps
        is_due = trainer.global_step // self.every_n_steps > saved
        is_late = trainer.world_size == 1 and self._clock() - self._saved_at > LONGEST
        if (is_due or is_late) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved_at = self._clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that a fit resumes from."""
        super().on_train_start(trainer, pl_module)
        if self.every_n_steps is not None:
            self._last_global_step_saved = trainer.global_step
            self._saved_at = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch, unless a validation or the end of the epoch follows."""
        if self.every_n_steps is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        loop = trainer.fit_loop.epoch_loop
        validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        is_end = validates or loop.batch_progress.is_last_batch
        if not (is_end or loop._should_accumulate() or needs_of(trainer).whole_epochs):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation within an epoch."""
        if self.every_n_steps is None:
            super().on_validation_end(trainer, pl_module)
        elif not (
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            or needs_of(trainer).whole_epochs
        ):
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation."""
        if self.every_n_steps is None:
            super().on_train_epoch_end(trainer, pl_module)
        else:
            self._save_if_due(trainer)


def last_checkpoint_of(
    callbacks: Sequence[Callback], every_n_steps: int | None, keeps: bool
) -> list[LastCheckpoint]:
    """Return the callback that keeps ``last.ckpt``; none if a fit has its own, or keeps nothing.

    Args:
        callbacks: Callbacks of the user.
        every_n_steps: See :class:`LastCheckpoint`.
        keeps: Whether the fit keeps checkpoints.

    Raises:
        ValueError: If the number of steps is below 1.
    """
    last = LastCheckpoint(every_n_steps)
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        return [last] if keeps else []
    if every_n_steps is not None:
        say(
            f"{OPTION} has no effect, as trainer.callbacks has a ModelCheckpoint: set its "
            f"every_n_train_steps"
        )
    return []
