"""Creation of a run's folder, and the names of the files in it."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CONFUSION_FILE",
    "ERROR_COLUMN",
    "GALLERY",
    "METRICS_FILE",
    "PREDICT_FILE",
    "SCORES_FILE",
    "create_run_folder",
]

METRICS_FILE = "metrics.json"
PREDICT_FILE = "predict.json"
"""File that predict writes instead of ``metrics.json``, with the origin of the scores."""
SCORES_FILE = "scores.csv"
ERROR_COLUMN = "error"
"""Column of ``scores.csv`` that states why an image could not be read; absent without any."""
CONFUSION_FILE = "confusion.png"
GALLERY = "gallery"
"""Folder of the gallery images, and stem of the ``.json`` file in it that lists them."""


def create_run_folder(root: Path, name: str) -> Path:
    """Create ``root/name/<n>`` with the next free number; two runs never share a folder.

    Raises:
        ValueError: If the folder cannot be created.
    """
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
