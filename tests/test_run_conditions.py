"""Conditions of a run in ``metrics.json``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from anomaly_clip.cli import main
from anomaly_clip.recording.run_conditions import file_sha256


@pytest.mark.slow
def test_a_fitted_detector_records_images_checkpoint_and_device(
    mvtec_root: Path, tmp_path: Path
) -> None:
    words = ["--model", "PaDiM", "--model.image_size", "32", "--model.num_channels", "8"]
    words += ["--model.backbone.weights", "random", "--data", "MVTecAD", "--data.root"]
    words += [str(mvtec_root), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    words += ["--data.categories", "[bottle]", "--output.page", "false"]
    assert main(["each", *words, "--output.folder", str(tmp_path / "run")]) == 0
    checkpoint = tmp_path / "run" / "bottle" / "checkpoints" / "last.ckpt"
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    runs = [
        json.loads((folder / "metrics.json").read_text())["run"]
        for folder in (tmp_path / "run" / "bottle", tmp_path / "run")
    ]
    for run in runs:
        protocol = run["protocol"]
        assert protocol["root"] == str(mvtec_root)
        assert protocol["mask_values"] == "values above 0 are defects"
        assert protocol["evaluator"]["fpr_limit"] == 0.3
        assert protocol["conventions"]["regions"].startswith("8-connected")
    assert runs[0]["protocol"]["fitted_images"] == 2
    assert runs[1]["protocol"]["fitted_images"] == {"bottle": 2}
    environment = {
        "device": "cpu",
        "precision": "32-true",
        "processes": 1,
        "threads": torch.get_num_threads(),
    }
    assert runs[0]["environment"] == {**environment, "checkpoint_sha256": sha256}
    assert runs[1]["environment"] == {**environment, "checkpoint_sha256": {"bottle": sha256}}


def test_a_removed_file_has_no_hash(tmp_path: Path) -> None:
    assert file_sha256(tmp_path / "gone.ckpt") is None
