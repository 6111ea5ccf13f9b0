"""Programs of a detector or of an exported folder, and their differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_programs import row_of, write_detector

from anomaly_clip.exporting.measurement import subject_of_folder


def test_the_parts_of_scores_are_scaled_before_decisions_are_compared(tmp_path: Path) -> None:
    subject = subject_of_folder(write_detector(tmp_path), ["onnxruntime"], 1)
    calibration = {"part_ranges": [[0, 1], [10, 30]], "levels": [{"threshold": 1.0}]}
    subject.calibration = calibration
    subject.expected = {
        "image_score": np.zeros(2, np.float32),
        "score_parts": np.array([[0.5, 21], [0.5, 19]], np.float32),
    }
    row = row_of("onnxruntime", 1)
    row.outputs = {
        "image_score": np.zeros(3, np.float32),
        "score_parts": np.array([[0.5, 19], [0.5, 19], [9, 9]], np.float32),
    }
    difference = subject.differences(row)
    assert difference is not None
    assert difference.flips == 1


def test_a_score_at_the_threshold_is_normal_in_spite_of_roundings(tmp_path: Path) -> None:
    subject = subject_of_folder(write_detector(tmp_path), ["onnxruntime"], 1)
    subject.calibration = {
        "part_ranges": None,
        "tolerance": 0.01,
        "levels": [{"threshold": 1.0}],
    }
    subject.expected = {"image_score": np.array([1.0, 1.5], np.float32)}
    flips = {}
    for runtime in ("onnxruntime", "torch"):
        row = row_of(runtime, 1)
        row.outputs = {"image_score": np.array([1.001, 1.5, 0], np.float32)}
        difference = subject.differences(row)
        assert difference is not None
        flips[runtime] = difference.flips
    assert flips == {"onnxruntime": 0, "torch": 1}, "predict itself decides without a tolerance"
