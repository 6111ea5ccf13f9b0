"""Tests of ``fit --calibrate true``: images held out, and fits that cannot be calibrated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_calibrate import own_images, photographs

from anomaly_clip.cli import main
from anomaly_clip.commands.fit_calibration import check_calibratable, hold_images_out
from anomaly_clip.data import ImageFolder
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.methods import SDP, Contrastive


def test_number_of_images_follows_from_the_rate(tmp_path: Path) -> None:
    data = ImageFolder(str(photographs(tmp_path, 2)))
    method = SDP({"name": "demo", "pretrained": "demo"})  # type: ignore[arg-type]
    hold_images_out(method, data, CalibrationSettings(alpha=[0.01, 0.05]))
    assert data.calibration.hold_out is not None
    assert data.calibration.hold_out.num_needed == 149  # 99, and half as many for the ranges


def test_only_detectors_are_calibrated() -> None:
    with pytest.raises(UserError, match="Contrastive gives no anomaly scores"):
        check_calibratable(Contrastive())
    method = SDP({"name": "demo", "pretrained": "demo"})  # type: ignore[arg-type]
    check_calibratable(method)
    method.transductive = True  # type: ignore[misc]
    with pytest.raises(UserError, match="SDP scores images by each other"):
        check_calibratable(method)


def test_fits_that_cannot_be_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photographs(tmp_path / "photos", 4)
    fit = ["fit", *own_images(root, tmp_path / "runs", "--calibrate", "true")]
    assert main([*fit, "--trainer.enable_checkpointing", "false"]) == 2
    assert "keeps none" in capsys.readouterr().err
    shutil.rmtree(root / "good")
    photographs(root, 1)
    assert main(fit) == 2
    assert "at most 0 may be held out" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/*/*"))
