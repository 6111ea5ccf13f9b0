"""Tests of calibration by cross-validation."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_calibrate import checkpoint, content_of, own_images, photographs

from anomaly_clip.cli import main
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.methods import RD4AD
from anomaly_clip.recording.cross_validation import check_folds


@pytest.mark.slow
def test_folds_calibrate_by_cross_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path / "photos", 9)
    words = ["fit", *own_images(root, tmp_path / "runs", "--calibrate", "true")]
    assert main([*words, "--calibration.folds", "4"]) == 0
    content = content_of(tmp_path)
    record = content["calibration"]["categories"]["photos"]
    assert len(content["fitted_images"]) == record["n"] == 9
    assert record["kind"] == "cross_validation"
    assert "estimated by cross-validation" in capsys.readouterr().err.lower()
    # A fold by hand: the images of another run, which is fitted without them.
    predict = ["predict", "--data.root", str(root), "--output.page", "false"]
    predict += ["--output.folder", str(tmp_path / "out"), "--ckpt_path", str(checkpoint(tmp_path))]
    assert main([*predict, "--output.maps", "false"]) == 0
    fitted = [float(line.split(",")[3]) for line in _rows(tmp_path / "out" / "scores.csv")]
    assert min(record["scores"]) > max(fitted)  # images of the bank have lower scores
    assert main([*words, "--calibration.folds", "10"]) == 2
    assert "9 normal images cannot be divided into 10 folds" in capsys.readouterr().err


@pytest.mark.slow
def test_each_image_counts_once_with_few_shots(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", 9)
    words = ["fit", *own_images(root, tmp_path / "runs", "--calibrate", "true")]
    assert main([*words, "--calibration.folds", "3", "--data.shots", "4"]) == 0
    content = content_of(tmp_path)
    record = content["calibration"]["categories"]["photos"]
    assert (len(content["fitted_images"]), record["n"]) == (4, 9)  # 15 if folds overlap


def _rows(file: Path) -> list[str]:
    return file.read_text().splitlines()[1:]


def test_methods_of_many_steps_are_refused() -> None:
    method = RD4AD({"name": "resnet18", "weights": "random"}, image_size=64)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fitted in a single pass, such as PaDiM"):
        check_folds(method, CalibrationSettings(folds=5))
