"""Checkpoints: written beside their target and renamed, at chosen steps, without leftovers."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path, leftovers
from anomaly_clip.records import needs_of

if sys.platform != "win32":
    import fcntl

__all__ = ["AtomicCheckpointIO", "LastCheckpoint", "remove_leftovers", "save_atomically"]

LAST = "last"
"""Name of the checkpoint without its suffix."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save each checkpoint in a temporary file in the same folder, then rename it.

    Lightning's own class moves a file from ``$TMPDIR``; across file systems this truncates the
    earlier checkpoint first. A process that is killed here leaves the earlier checkpoint, and a
    temporary file, which the next save of the same checkpoint removes.

    Without the command line: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: State of the trainer and its modules.
            path: File to write, or a URL, which is left to Lightning.
            storage_options: Not supported.

        Raises:
            OSError: If the file cannot be written; an earlier one is then unchanged.
            TypeError: If there are storage options.
        """
        if storage_options is not None or not _is_local_file_protocol(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        target = Path(str(path).removeprefix("file://"))
        remove_leftovers(target.parent, target.name)
        with contextlib.ExitStack() as stack, atomic_path(target) as temporary:
            file = stack.enter_context(_open_locked(temporary))
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the new name without content
            if sys.platform == "win32":  # an open file cannot be renamed there
                file.close()


def save_atomically(trainer: Trainer) -> None:
    """Let a trainer save with :class:`AtomicCheckpointIO`, unless it has another class for it."""
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, _WrappingCheckpointIO):  # such as AsyncCheckpointIO
        if type(writer.checkpoint_io) in (TorchCheckpointIO, type(None)):
            writer.checkpoint_io = AtomicCheckpointIO()
    elif type(writer) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def remove_leftovers(folder: Path, name: str = "*.ckpt") -> None:
    """Remove temporary files of saves that were killed.

    A process locks the file that it writes, so files of living processes stay. Where the file
    system has no locks, all of them stay.

    Args:
        folder: Folder of the checkpoints.
        name: File name of the checkpoint, or a pattern.
    """
    for file in leftovers(folder, name):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if sys.platform != "win32":
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
        if sys.platform == "win32":
            with contextlib.suppress(OSError):  # raised for files that are open
                file.unlink()


def _open_locked(path: Path) -> IO[bytes]:
    """Create a file and lock it, so that :func:`remove_leftovers` does not remove it."""
    while True:
        file = path.open("wb")
        if sys.platform == "win32":
            return file
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was removed before it was locked
            return file
        file.close()


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``: the state at the end of an epoch or validation, or every so many steps.

    A method whose fits can be resumed only from the end of an epoch is saved there, at the first
    end of an epoch after each number of steps.

    Args:
        every_n_steps: Steps between two saves, counted as ``trainer.max_steps`` counts them; None:
            save after each epoch or validation.

    Raises:
        ValueError: If the number of steps is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_at_least("output.checkpoint_every_n_steps", every_n_steps, 1)
        super().__init__(filename=LAST, enable_version_counter=False)
        self.every_n_steps = every_n_steps

    @property
    def state_key(self) -> str:
        """Key of Lightning's own class, so that checkpoints fit any number of steps."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def _save_if_due(self, trainer: Trainer) -> None:
        assert self.every_n_steps is not None
        saved = self._last_global_step_saved // self.every_n_steps
        is_due = trainer.global_step // self.every_n_steps > saved
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that a fit resumes from."""
        super().on_train_start(trainer, pl_module)
        if self.every_n_steps is not None:
            self._last_global_step_saved = trainer.global_step

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
