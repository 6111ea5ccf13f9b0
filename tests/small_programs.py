"""A program that takes milliseconds, its folder, and rows of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import PIL
from onnx import TensorProto, helper

from anomaly_clip.exporting.programs import file_record
from anomaly_clip.exporting.timing import Program, Timing

SIDE = 32


def write_program(file: Path, gain: float = 1.0) -> Path:
    """Write a program whose map is the mean over the colours, and whose score is its mean."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "gain"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "colours"], ["anomaly_map"], keepdims=0),
        helper.make_node("ReduceMean", ["anomaly_map", "sides"], ["image_score"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", SIDE, SIDE]),
        ],
        [
            helper.make_tensor("gain", TensorProto.FLOAT, [], [gain]),
            helper.make_tensor("colours", TensorProto.INT64, [1], [1]),
            helper.make_tensor("sides", TensorProto.INT64, [2], [1, 2]),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def images(count: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)


def program(file: Path, runtime: str = "onnxruntime") -> Program:
    job = {"file": str(file), "session": runtime, "precision": "float32"}
    return Program(runtime, "float32", job, file.stat().st_size if file.exists() else None)


def write_detector(target: Path, gain: float = 1.0) -> Path:
    """Write an exported detector, calibrated at the mean of its images.

    With a gain, its program differs from the outputs in ``check/``.
    """
    (target / "check").mkdir(parents=True)
    file = write_program(target / "detector.onnx", gain)
    checked = images(2)
    maps = checked.mean(axis=1, dtype=np.float32)
    outputs = {"image_score": maps.mean(axis=(1, 2)), "anomaly_map": maps}
    np.savez(target / "check" / "expected.npz", images=checked, **outputs)
    record = {
        "format": 1,
        "method": "Mean",
        "category": "plank",
        "program": {
            **file_record(file),
            "format": "onnx",
            "precision": "float32",
            "external_data": None,
        },
        "preprocessing": {
            "image_size": SIDE,
            "rule": "square",
            "size": None,
            "filter": "bicubic",
            "bit_depth": None,
            "max_pixels": 10**7,
        },
        "calibration": {
            "part_ranges": None,
            "levels": [{"threshold": float(np.mean(outputs["image_score"]))}],
        },
        "remarks": [],
        "versions": {"pillow": PIL.__version__},
    }
    (target / "detector.json").write_text(json.dumps(record))
    return target


def row_of(
    runtime: str, milliseconds: float | None, batch_size: int = 1, precision: str = "float32"
) -> Timing:
    row = Timing(Program(runtime, precision), batch_size)
    if milliseconds is None:
        row.error = "not installed"
    else:
        row.times = [milliseconds * batch_size / 1000] * 3
    return row
