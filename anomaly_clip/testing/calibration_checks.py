"""Checks of decisions: a method is calibrated, and decides on its calibration images."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from anomaly_clip.demo.photographs import draw_photograph
from anomaly_clip.testing.images import NAMES, SIDE
from anomaly_clip.testing.run_files import read_scores
from anomaly_clip.testing.subject import Subject

__all__ = ["calibration_decides", "transductive_methods_are_not_calibrated"]

NUM_IMAGES = 8
NUMBER = 9  # of the images, unlike those of the splits


def calibration_decides(subject: Subject) -> None:
    """``calibrate`` gives thresholds by which ``predict`` calls the calibration images normal."""
    _applies(subject)
    subject.require(not subject.is_transductive, "is transductive: scores depend on other images")
    # Reference images are training images, which are test images here.
    options = ["--data.root", str(_new_images(subject)), "--data.allow_overlap", "true"]
    if subject.must_be_fitted:
        checkpoint = subject.folder / "calibrated" / "last.ckpt"
        checkpoint.parent.mkdir(exist_ok=True)
        shutil.copy(subject.checkpoint, checkpoint)
        options += ["--ckpt_path", str(checkpoint)]
    folder = subject.succeed("calibrate", *options)
    if not subject.must_be_fitted:
        options += ["--calibration.file", str(folder)]
    rows = read_scores(subject.succeed("predict", *options, "--output.maps", "false"))
    assert rows, "predict has scored no image"
    for row in rows:
        assert 0 < float(row["p_value"]) <= 1, f"the p-value of {row['path']} is {row['p_value']}"
        assert row["decision"] in ("normal", "anomalous"), row["decision"]
    has_parts = bool(subject.scorer.method.score_part_names)
    wrong = [row["path"] for row in rows if row["decision"] != "normal"]
    # The ranges of score parts are from other images, which may have higher scores.
    assert has_parts or not wrong, f"{wrong[0]} is anomalous, but calibrated on"


def transductive_methods_are_not_calibrated(subject: Subject) -> None:
    """``calibrate`` refuses a transductive method in one line."""
    _applies(subject)
    subject.require(subject.is_transductive, "is not transductive")
    finished = subject.run("calibrate", "--data.root", str(_new_images(subject)))
    assert finished.code == 2, f"calibrate ends with {finished.code}"
    assert "Traceback" not in finished.stderr, finished.stderr


calibration_decides.slow = True  # type: ignore[attr-defined]


def _applies(subject: Subject) -> None:
    subject.require(subject.scores, "is not a detector")
    subject.require("class_path" not in subject.data_options, "has a data set of its own")


def _new_images(subject: Subject) -> Path:
    """Return categories whose normal training and test images are the same, and new."""
    root = subject.folder / "new_images"
    for name in NAMES:
        for index in range(NUM_IMAGES):
            image = Image.fromarray(draw_photograph(name, NUMBER, index, None, SIDE).image)
            for split in ("train", "test"):
                file = root / name / split / "good" / f"{index:03d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
    return root
