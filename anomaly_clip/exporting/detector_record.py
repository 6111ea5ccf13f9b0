"""Parts of ``detector.json``: the ranges of outputs, the calibration, versions; and a README."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anomaly_clip.decisions.sentences import guarantee
from anomaly_clip.detector import Detector
from anomaly_clip.exporting.parity import Arrays, tolerance_of
from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["RATES", "calibration_record", "outputs_record", "readme", "version_of", "versions"]

RATES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
"""False-alarm rates of an exported detector, besides those of its calibration."""
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "pillow")


def outputs_record(method: AnomalyMethod, expected: Arrays) -> dict[str, Any]:
    """Return shapes, names and ranges of the outputs of a program.

    Args:
        method: The method.
        expected: Outputs of the images of the comparison.
    """
    record: dict[str, Any] = {}
    for name, values in expected.items():
        if name == "score_parts":
            low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
            record[name] = {"names": list(method.score_part_names), "low": low, "high": high}
        else:
            shape = {"shape": list(values.shape[1:])} if name == "anomaly_map" else {}
            record[name] = {**shape, "low": float(values.min()), "high": float(values.max())}
    return record


def calibration_record(detector: Detector) -> dict[str, Any] | None:
    """Return the calibration of a detector with its thresholds; None without one."""
    name, decisions = detector.resolve()
    if decisions is None:
        return None
    calibration, record = decisions.calibration, decisions.records[name]
    rates = [*calibration.alphas, *(rate for rate in RATES if rate not in calibration.alphas)]
    levels = [record.level(rate, calibration.confidence) for rate in rates]
    stored = record.stored(levels)
    return {
        "n": record.num_images,
        "kind": record.kind,
        "alpha": list(calibration.alphas),
        "confidence": calibration.confidence,
        "scores": list(stored.scores),
        "counts": None if stored.counts is None else list(stored.counts),
        "map_threshold": record.map_threshold,
        "part_ranges": None
        if record.part_ranges is None
        else [list(limits) for limits in record.part_ranges],
        "bit_depth": calibration.conditions.get("bit_depth"),
        "tolerance": tolerance_of(record),
        "levels": [
            {
                **asdict(level),
                "as_asked": level.is_as_asked,
                "sentence": guarantee(record, level),
            }
            for level in levels
        ],
    }


def version_of(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    numbers = {name: version_of(name) for name in PACKAGES}
    installed = {name: number for name, number in numbers.items() if number is not None}
    return {"python": platform.python_version(), **installed}


def readme(record: dict[str, Any]) -> str:
    """Return the three lines of the README of an exported detector.

    Args:
        record: Content of its ``detector.json``.
    """
    package = "onnxruntime" if record["program"]["format"] == "onnx" else "torch"
    return (
        f"{record['method']} detector of {record['category']}: `python detector.py "
        f"IMAGE_OR_FOLDER` scores images.\n"
        f"It needs `pip install numpy pillow=={version('pillow')} {package}`, in a Python that "
        f"this Pillow supports; others may resize otherwise by one level, which changes scores.\n"
        f"`python detector.py --check` compares this machine with the one of the export; "
        f"`detector.json` describes the rest.\n"
    )
