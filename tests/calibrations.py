"""Calibrations written by hand, for tests of what test and predict make of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.recording import run_decisions

PADIM = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
PADIM += ["--model.num_channels=8", "--trainer.accelerator=cpu"]
PADIM += ["--data=ImageFolder", "--data.num_workers=0"]


def photograph(seed: int, defect: int = 0) -> np.ndarray:
    """Return grey noise; with a defect, a square of this side in the middle is white."""
    image = np.random.default_rng(seed).integers(90, 130, (40, 56, 3)).astype(np.uint8)
    image[16 : 16 + defect, 20 : 20 + defect] = 255
    return image


def write_photographs(folder: Path, count: int, seed: int, defect: int = 0) -> Path:
    """Write photographs ``0.png``, ``1.png``, ... into a folder."""
    for number in range(count):
        save_picture(folder / f"{number}.png", photograph(seed + number, defect))
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def section_of(run: Path) -> dict[str, Any]:
    """Return the section ``decisions`` of a run."""
    file = next(f for n in ("predict.json", "metrics.json") if (f := run / n).is_file())
    section: dict[str, Any] = json.loads(file.read_text())["decisions"]
    return section


def conditions_of(words: Sequence[str], folder: Path, method: str, **record: Any) -> dict[str, Any]:
    """Return the conditions under which a command line of ``predict`` scores images."""
    seen: list[dict[str, Any]] = []
    file = folder / "any.json"
    Calibration(method, {"any": CategoryCalibration((0.0,), **record)}).write(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_decisions, "check_conditions", lambda _, now, __: seen.append(dict(now)))
        patch.setattr(Calibration, "of", lambda self, *_: self.categories["any"])
        options = [f"--calibration.file={file}", f"--output.folder={folder / 'conditions'}"]
        assert main([*words, *options]) == 0
    return seen[0]
