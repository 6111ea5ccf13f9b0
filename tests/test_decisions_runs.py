"""Decisions of ``predict`` and ``test``, by calibrations written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import PADIM, conditions_of, read_csv, section_of, write_photographs

from anomaly_clip.cli import main
from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration


class Planks:
    """A fitted PaDiM, and a calibration of it with 19 images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fitted = folder / "fit" / "checkpoints" / "last.ckpt"
        train = write_photographs(folder / "train", 6, seed=0)
        fit = ["fit", *PADIM, f"--data.root={train}", "--data.normal=all"]
        assert main([*fit, f"--output.folder={folder / 'fit'}"]) == 0
        write_photographs(folder / "calibration", 19, seed=100)
        self.words = ["predict", f"--ckpt_path={self.fitted}"]
        shown = ["--output.page=false", "--output.maps=false"]
        words = [
            *self.words,
            f"--data.root={folder / 'calibration'}",
            "--data.normal=folders",
            *shown,
        ]
        self.conditions = conditions_of(words, folder, "PaDiM")
        rows = read_csv(folder / "conditions" / "scores.csv")
        self.scores = sorted(float(row["image_score"]) for row in rows)
        self.file = self.write()
        self.images = folder / "images"
        write_photographs(self.images / "good", 3, seed=200)
        write_photographs(self.images / "scratch", 2, seed=300, defect=9)
        write_photographs(self.images / "spot", 2, seed=400, defect=1)

    def write(self, name: str = "calibration.json", **changes: Any) -> Path:
        record = CategoryCalibration(tuple(self.scores), map_threshold=self.scores[-1])
        content = {
            "method": "PaDiM",
            "categories": {"planks": record},
            "conditions": self.conditions,
            **changes,
        }
        path = self.folder / name
        Calibration(**content).write(path)
        return path

    def run(self, verb: str, out: Path, *more: str, file: Path | None = None) -> int:
        words = [verb, f"--ckpt_path={self.fitted}", f"--data.root={self.images}"]
        words += ["--data.normal=folders", f"--output.folder={out}"]
        return main([*words, f"--calibration.file={file or self.file}", *more])


@pytest.fixture(scope="module")
def planks(tmp_path_factory: pytest.TempPathFactory) -> Planks:
    return Planks(tmp_path_factory.mktemp("planks"))


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_predict_decides_on_every_image(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planks.run("predict", tmp_path / "run") == 0
    rows = read_csv(tmp_path / "run" / "scores.csv")
    names = ["path", "category", "label", "image_score", "p_value", "decision", "weights"]
    assert list(rows[0]) == names
    scores = np.array([float(row["image_score"]) for row in rows])
    expected = [(1 + sum(s >= score for s in planks.scores)) / 20 for score in scores]
    assert [float(row["p_value"]) for row in rows] == pytest.approx(expected, abs=1e-12)
    decisions = ["anomalous" if p <= 0.05 else "normal" for p in expected]
    assert [row["decision"] for row in rows] == decisions
    assert decisions.count("anomalous") >= 2
    section = section_of(tmp_path / "run")
    assert section["alpha"] == 0.05
    assert section["source"] == str(planks.file)
    entry = section["categories"]["images"]
    assert entry["num_images"] == 7
    assert entry["num_anomalous"] == decisions.count("anomalous")
    assert (entry["n"], entry["k"], entry["average"]) == (19, 1, 0.05)
    assert entry["threshold"] == planks.scores[-1]
    assert entry["as_asked"] is True
    assert "recall" not in entry
    text = printed(capsys)
    assert f"images: {entry['num_anomalous']} of 7 images anomalous. {entry['sentence']}" in text


def test_without_a_calibration_predict_says_how_to_get_one(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*planks.words, f"--data.root={planks.images}", "--data.normal=folders"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}"]) == 0
    assert "anomaly_clip calibrate" in printed(capsys)
    assert "decision" not in read_csv(tmp_path / "run" / "scores.csv")[0]
    assert "decisions" not in json.loads((tmp_path / "run" / "predict.json").read_text())
