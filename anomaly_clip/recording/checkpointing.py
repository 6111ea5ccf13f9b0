"""Checkpoints: written next to their target and renamed, at chosen steps, without leftovers."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path, leftovers
from anomaly_clip.progress import say
from anomaly_clip.records import needs_of

if sys.platform != "win32":
    import fcntl

__all__ = [
    "AtomicCheckpointIO",
    "LastCheckpoint",
    "last_checkpoint_of",
    "remove_leftovers",
    "save_atomically",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit on the size of files that is full."""
OPTION = "output.checkpoint_every_n_steps"
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
        try:
            _write(content, target)
        except OSError as error:
            if error.errno not in FULL:
                raise
            full = OSError(
                f"{target}: {error.strerror}: this checkpoint is not saved, and an earlier one is "
                f"unchanged: free space, or choose another --output.root"
            )
            full.errno = error.errno
            raise full from None


def _write(content: io.BytesIO, target: Path) -> None:
    with contextlib.ExitStack() as stack, atomic_path(target) as temporary:
        file = stack.enter_context(_open_locked(temporary))
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # or a power failure could leave the new name without content
        if sys.platform == "win32":  # an open file cannot be renamed there
            file.close()


def save_atomically(trainer: Trainer) -> None:
    """Let a trainer save with :class:`AtomicCheckpointIO`, unless it has another class for it."""
    owner: Any = trainer.strategy
    while isinstance(owner.checkpoint_io, _WrappingCheckpointIO):  # such as AsyncCheckpointIO
        owner = owner.checkpoint_io
    if type(owner.checkpoint_io) is TorchCheckpointIO:
        owner._checkpoint_io = AtomicCheckpointIO()


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
            check_at_least(OPTION, every_n_steps, 1)
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
