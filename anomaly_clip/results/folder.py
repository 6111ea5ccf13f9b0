"""Creation of a run's folder, and the names of the files in it."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = [
    "CONFUSION_FILE",
    "DRIFT_FILE",
    "ERROR_COLUMN",
    "GALLERY",
    "MASKS",
    "METRICS_FILE",
    "PREDICT_FILE",
    "SCORES_FILE",
    "SCRATCH",
    "claim_scratch",
    "create_run_folder",
    "remove_abandoned",
]

SCRATCH = ".scratch"
"""Folder for the files of a run that are removed at its end."""
METRICS_FILE = "metrics.json"
PREDICT_FILE = "predict.json"
"""File that predict writes instead of ``metrics.json``, with the origin of the scores."""
SCORES_FILE = "scores.csv"
ERROR_COLUMN = "error"
"""Column of ``scores.csv`` that states why an image could not be read; absent without any."""
CONFUSION_FILE = "confusion.png"
DRIFT_FILE = "drift.csv"
"""File of predict with the online p-value of each image, with a calibration."""
MASKS = "masks"
"""Folder of the masks that test and predict write on request."""
GALLERY = "gallery"
"""Folder of the gallery images, and stem of the ``.json`` file in it that lists them."""


def create_run_folder(root: Path, name: str) -> Path:
    """Create ``root/name/<n>`` with the next free number; two runs never share a folder.

    Raises:
        ValueError: If the folder cannot be created.
    """
    remove_abandoned(root)
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (parent / str(number)).mkdir()
            except FileExistsError:
                continue  # another run created it first
            return parent / str(number)
    except OSError as error:
        raise ValueError(
            f"output.root {root}: cannot create a run folder there ({error}): choose a writable "
            f"folder"
        ) from None


def claim_scratch(folder: Path) -> None:
    """Create a scratch folder, and record this process in it.

    Args:
        folder: The scratch folder, which several processes may share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / f"owner-{os.getpid()}"
    if not owner.exists():
        owner.write_text(f"{platform.node()}\n{_start_of(os.getpid())}", encoding="utf-8")


def remove_abandoned(root: Path) -> None:
    """Remove the scratch folders of runs whose processes were killed on this machine.

    Args:
        root: Folder of the runs: ``root/name/<n>``, or ``root/name/<n>/<category>``.
    """
    for scratch in [*root.glob(f"*/*/{SCRATCH}"), *root.glob(f"*/*/*/{SCRATCH}")]:
        with suppress(OSError, ValueError):  # not readable, or removed in the meantime
            owners = list(scratch.glob("owner-*"))
            if owners and not scratch.is_symlink() and all(map(_is_gone, owners)):
                shutil.rmtree(scratch, ignore_errors=True)


def _is_gone(owner: Path) -> bool:
    """Return whether the process of a scratch folder has ended; False on another machine."""
    machine, _, start = owner.read_text(encoding="utf-8").partition("\n")
    if machine != platform.node() or os.name == "nt":  # where os.kill ends a process
        return False
    number = int(owner.name.rpartition("-")[2])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        pass
    return _start_of(number) != start  # another process has the number now


def _start_of(number: int) -> str:
    """Return the start time of a process; empty where the system does not tell."""
    try:
        content = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        return content.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
