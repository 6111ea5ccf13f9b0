"""The folder of an exported detector, which appears as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from anomaly_clip.errors import UserError

__all__ = ["RECORD", "RUNTIME", "atomic_folder", "check_folder"]

RECORD = "detector.json"
"""Name of the file that describes an exported detector."""
RUNTIME = "detector.py"
"""Name of the program that runs it."""
WRITTEN = frozenset(
    {RECORD, RUNTIME, "README.md", "check", "__pycache__"}
    | {f"detector.{ending}" for ending in ("onnx", "onnx.data", "pt2")}
)
"""Names that an exported detector may have in its folder; others are files of the user."""


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that an exported detector may be written into a folder.

    Args:
        folder: The folder.
        overwrite: Whether an exported detector may be replaced.

    Raises:
        UserError: If it is a file, or holds other files, or a detector that may not be replaced.
    """
    folder = folder.resolve()  # a link stays, and its target is replaced
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--folder {folder} is a file: give the name of a new folder")
    if os.path.ismount(folder):
        raise UserError(
            f"--folder {folder} is a mount point, which cannot be replaced as a whole: give the "
            f"name of a folder in it, such as {folder / 'detector'}"
        )
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    if not (folder / RECORD).is_file():
        raise UserError(
            f"--folder {folder} holds other files, which an export would not leave alone: give the "
            f"name of a new folder"
        )
    if not overwrite:
        raise UserError(
            f"{folder} holds an exported detector: give another --folder, or add --overwrite"
        )
    others = [name for name in names if name not in WRITTEN]
    if others:
        raise UserError(
            f"--folder {folder} holds an exported detector and other files, which --overwrite "
            f"would remove, such as {others[0]}: move them, or give another --folder"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to a folder, which it replaces in the end.

    On an error, or a signal, the temporary folder is removed and the other one stays as it was.
    What a killed process has left is removed by the next export to the same place.

    Args:
        folder: The target; see :func:`check_folder`. Of a link, it is the folder that it leads to.
        overwrite: Whether an exported detector may be replaced.

    Raises:
        UserError: If the target must not be replaced, also if it has appeared in the meantime.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    check_folder(folder, overwrite)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        check_folder(folder, overwrite)  # another export may have been faster
        _replace(folder, temporary)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # the error of a full disk
            error.filename = str(folder)
        elif error.filename is not None:  # a name that nobody has typed, and that is gone
            name = str(error.filename).replace(str(temporary), str(folder))
            raise type(error)(error.errno, error.strerror, name) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, temporary: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    before = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    folder.rename(before)
    try:
        temporary.rename(folder)
    except OSError:
        before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that do not run any more."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.(?:old\.)?tmp")
    for path in folder.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _runs(int(match[1])):
            continue
        if path.name.endswith(".old.tmp") and not folder.exists():
            path.rename(folder)  # killed between the two renames
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # of an earlier process with the same number
    if os.name == "nt":  # where this signal would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
