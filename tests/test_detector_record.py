from __future__ import annotations

import platform
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from anomaly_clip.exporting.detector_record import outputs_record, readme, version_of, versions


def test_ranges_are_over_all_images_and_those_of_parts_column_by_column() -> None:
    method: Any = SimpleNamespace(score_part_names=("r0", "r1"))
    outputs = {
        "image_score": np.array([3.0, -1.0], np.float32),
        "anomaly_map": np.array([[[0.0, 5.0]], [[-2.0, 1.0]]], np.float32),
        "score_parts": np.array([[1.0, 40.0], [2.0, 30.0]], np.float32),
    }
    assert outputs_record(method, outputs) == {
        "image_score": {"low": -1.0, "high": 3.0},
        "anomaly_map": {"shape": [1, 2], "low": -2.0, "high": 5.0},
        "score_parts": {"names": ["r0", "r1"], "low": [1.0, 30.0], "high": [2.0, 40.0]},
    }


def test_versions_are_of_what_is_installed() -> None:
    numbers = versions()
    assert numbers["python"] == platform.python_version()
    assert torch.__version__.startswith(numbers["torch"])
    assert version_of("a package that nobody has") is None
    assert None not in numbers.values()


def test_the_readme_names_the_packages_of_the_format() -> None:
    for kind, package in (("onnx", "onnxruntime"), ("torch_export", "torch")):
        text = readme({"method": "SDP", "category": "tile", "program": {"format": kind}})
        assert f"numpy pillow=={version('pillow')} {package}`" in text
        assert len(text.splitlines()) == 3
