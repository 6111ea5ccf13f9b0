"""A run's folder, and the record of what its figures come from."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["create_run_folder", "versions"]

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
    """Return the versions that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
