"""Writing of checkpoints: next to their target and renamed, without leftovers."""

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
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from anomaly_clip.errors import FULL
from anomaly_clip.files import atomic_path, leftovers

if sys.platform != "win32":
    import fcntl

__all__ = ["AtomicCheckpointIO", "remove_leftovers", "save_atomically"]


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
