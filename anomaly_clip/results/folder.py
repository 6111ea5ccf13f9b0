"""Creation of a run's folder, and the names of the files in it."""

from __future__ import annotations

import os
import platform
import re
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
    "find_run",
    "has_ended",
    "process_start",
    "remove_abandoned",
    "run_number",
]

RUN_FOLDER = re.compile(r"([0-9]+)(-[a-z]+)?")
"""Name of a run's folder, as ``3-test``; in 0.1.0, it was the number."""
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


def create_run_folder(root: Path, name: str, verb: str) -> Path:
    """Create ``root/name/<n>-<verb>`` with the next free number; two runs never share a number.

    Args:
        root: Folder of all runs.
        name: Name of the configuration.
        verb: Verb of the run, such as ``fit``.

    Raises:
        ValueError: If the folder cannot be created.
    """
    remove_abandoned(root)
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            number = max((run_number(path) or 0 for path in parent.iterdir()), default=0) + 1
            claim = parent / str(number)
            with suppress(FileExistsError):  # another run claims the number
                claim.mkdir()
                folder = parent / f"{number}-{verb}"
                if _of_number(parent, number) == [claim]:
                    return claim.rename(folder)
                claim.rmdir()  # another run has claimed and renamed it in the meantime
    except OSError as error:
        raise ValueError(
            f"output.root {root}: cannot create a run folder there ({error}): choose a writable "
            f"folder"
        ) from None


def run_number(folder: Path) -> int | None:
    """Return the number of a run's folder; None for other folders.

    Example:
        >>> from pathlib import Path
        >>> from anomaly_clip.results.folder import run_number
        >>> run_number(Path("runs/padim/12-test")), run_number(Path("runs/padim/of_0.1.0"))
        (12, None)
    """
    matched = RUN_FOLDER.fullmatch(folder.name)
    return int(matched[1]) if matched else None


def find_run(path: Path) -> Path:
    """Return a path in which the number of a run stands for its folder.

    ``runs/padim/3`` is ``runs/padim/3-test``, and so for the files in it.

    Args:
        path: A path, which is returned unchanged if it exists or has no number of a run.
    """
    with suppress(OSError):
        for folder in (path, *path.parents):
            if folder.exists():
                break
            if folder.name.isdecimal() and folder.parent.is_dir():
                runs = _of_number(folder.parent, int(folder.name))
                return runs[0] / path.relative_to(folder) if len(runs) == 1 else path
    return path


def _of_number(parent: Path, number: int) -> list[Path]:
    return [folder for folder in parent.iterdir() if run_number(folder) == number]


def claim_scratch(folder: Path) -> None:
    """Create a scratch folder, and record this process in it.

    Args:
        folder: The scratch folder, which several processes may share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / f"owner-{os.getpid()}"
    if not owner.exists():
        owner.write_text(f"{platform.node()}\n{process_start(os.getpid())}", encoding="utf-8")


def remove_abandoned(root: Path) -> None:
    """Remove the scratch folders of runs whose processes were killed on this machine.

    Args:
        root: Folder of the runs: ``root/name/<run>``, or ``root/name/<run>/<category>``.
    """
    scratches: list[Path] = []
    with suppress(OSError):  # another run names or removes its folder at this moment
        scratches += root.glob(f"*/*/{SCRATCH}")
        scratches += root.glob(f"*/*/*/{SCRATCH}")
    for scratch in scratches:
        with suppress(OSError, ValueError):  # not readable, or removed in the meantime
            owners = list(scratch.glob("owner-*"))
            if owners and not scratch.is_symlink() and all(map(_is_gone, owners)):
                shutil.rmtree(scratch, ignore_errors=True)


def _is_gone(owner: Path) -> bool:
    """Return whether the process of a scratch folder has ended; False on another machine."""
    machine, _, start = owner.read_text(encoding="utf-8").partition("\n")
    return has_ended(machine, int(owner.name.rpartition("-")[2]), start)


def has_ended(machine: str, number: int, start: str) -> bool:
    """Return whether a process has ended; False if it runs on another machine.

    Args:
        machine: Name of its machine.
        number: Number of the process.
        start: Its :func:`process_start`, as another process may have the number now.
    """
    if machine != platform.node() or os.name == "nt":  # where os.kill ends a process
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        pass
    return process_start(number) != start


def process_start(number: int) -> str:
    """Return the start time of a process; empty if it has ended, or the system does not tell."""
    try:
        content = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        fields = content.rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # a zombie has ended
    except (OSError, IndexError):
        return ""
