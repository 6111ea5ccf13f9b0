"""A run's folder: its number, the names of the files in it, and the versions it was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = [
    "CONFUSION_FILE",
    "CURVES_FILE",
    "GALLERY",
    "METRICS_FILE",
    "PREDICT_FILE",
    "SCORES_FILE",
    "create_run_folder",
    "versions",
]

METRICS_FILE = "metrics.json"
PREDICT_FILE = "predict.json"
"""Written by a predict in the place of metrics: the origin of its scores."""
SCORES_FILE = "scores.csv"
CURVES_FILE = "curves.json"
CONFUSION_FILE = "confusion.png"
GALLERY = "gallery"
"""Folder of the gallery's images, and name of the ``.json`` in it that lists them."""

PACKAGES = (
    "anomaly_clip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
    "opencv-python-headless",
)
"""Packages that metrics depend on."""


def create_run_folder(root: Path, name: str) -> Path:
    """Create ``root/name/<n>`` with the next free number; two runs never share a folder.

    Raises:
        ValueError: If the folder cannot be made.
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
                continue  # another run was faster
            return parent / str(number)
    except OSError as error:
        raise ValueError(f"output.root {root}: cannot make a run folder there ({error})") from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that metrics depend on."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "not installed as a package"
    return by_package
