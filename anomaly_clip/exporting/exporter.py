"""Export of a detector into a folder that runs by itself, with proof that it scores the same."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import anomaly_clip.runtime.detector as runtime
from anomaly_clip import __version__
from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError, check_at_least, check_choice, shortened
from anomaly_clip.exporting.detector_record import (
    calibration_record,
    outputs_record,
    readme,
    version_of,
    versions,
)
from anomaly_clip.exporting.folder import RECORD, RUNTIME, atomic_folder, check_folder
from anomaly_clip.exporting.graph import INPUT, DetectorGraph, trace
from anomaly_clip.exporting.labelled import (
    NOT_MEASURED,
    Drift,
    labelled_images,
    measure_drift,
    range_images,
)
from anomaly_clip.exporting.parity import (
    BOUNDS,
    Arrays,
    Difference,
    Run,
    batches_of,
    check_difference,
    compare,
    constant_outputs,
    eager_run,
    outputs_of,
)
from anomaly_clip.exporting.parity_images import (
    ParityImages,
    generated_images,
    images_of_check,
    images_of_folder,
)
from anomaly_clip.exporting.precision import (
    FLOAT32,
    check_precision,
    lower_program,
    lowered_backbone,
)
from anomaly_clip.exporting.programs import (
    DEFAULT_OPSET,
    FORMATS,
    OPSETS,
    check_packages,
    file_record,
    write_program,
)
from anomaly_clip.files import write_bytes, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import track

__all__ = ["ExportSettings", "Exported", "export_detector", "runtimes_of"]

FORMAT = 1
"""Version of the form of ``detector.json``."""
FINITE = dict.fromkeys(BOUNDS, sys.float_info.max)
"""Bounds of lower precision, which was asked for: its outputs are numbers."""
LOOSENED = 4
"""Differences of lower precision on other machines, as a multiple of those of the export. Our
choice: processors round 8-bit products in different ways."""
MAX_REASON = 300
NUM_CHECKED = 2
"""Images in ``check/``."""


@dataclass(frozen=True)
class ExportSettings:
    """Options of an export.

    Args:
        format: ``onnx`` or ``torch_export``.
        opset: Version of ONNX's operators; None: the default.
        num_images: Number of images of the comparison.
        images: Folder of images for the comparison; None: generated ones.
        include_images: Whether ``check/`` holds images of that folder, in place of generated ones.
        overwrite: Whether an exported detector may be replaced.
        precision: ``float32``, or that of the frozen backbone: ``bf16`` or ``int8``.

    Raises:
        ValueError: If a value is not as described.
    """

    format: str = "onnx"
    opset: int | None = None
    num_images: int = 8
    images: Path | None = None
    include_images: bool = False
    overwrite: bool = False
    precision: str = FLOAT32

    def __post_init__(self) -> None:
        check_choice("--format", self.format, FORMATS)
        check_precision(self.precision, self.format)
        check_at_least("--images", self.num_images, NUM_CHECKED)
        if self.opset is not None and self.opset not in OPSETS:
            raise ValueError(
                f"--opset {self.opset}: give a version from {OPSETS.start} to {OPSETS.stop - 1}, "
                f"or leave it out"
            )
        if self.opset is not None and self.format != "onnx":
            raise ValueError(f"--opset is for --format onnx, not {self.format}: leave it out")
        if self.include_images and self.images is None:
            raise ValueError("--include_images needs --data.root, a folder of images")


@dataclass
class Exported:
    """An exported detector.

    Args:
        folder: Its folder.
        record: Content of ``detector.json``.
        differences: Differences from torch by runtime.
        remarks: Messages on what a user has to know of it.
        failures: Messages of runtimes besides the first that cannot run the program.
        drift: Its metrics and those of torch, if there were labelled images.
    """

    folder: Path
    record: dict[str, Any]
    differences: dict[str, Difference] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    drift: Drift | None = None


def export_detector(
    detector: Detector,
    folder: Path,
    settings: ExportSettings = ExportSettings(),
    method: AnomalyMethod | None = None,
) -> Exported:
    """Write a folder that scores images as a detector does, without this package.

    Nothing is left behind if the program cannot be written, or differs from torch.

    Args:
        detector: The detector.
        folder: The folder; see :func:`~anomaly_clip.exporting.folder.check_folder`.
        settings: Options.
        method: The detector's method in float32, if the detector scores in another precision.

    Raises:
        UserError: If the method cannot be exported, or the folder must not be written.
    """
    check_folder(folder, settings.overwrite)
    if settings.format == "onnx":
        check_packages()
    graph = DetectorGraph(detector.method if method is None else method, detector.resolve()[0])
    _check_method(graph.method)
    images = _images(detector, settings)
    with _scoring():
        eager = eager_run(graph)
        expected = outputs_of(eager, images.square, len(images.square))
        _check_finite(expected)
    with atomic_folder(folder, settings.overwrite) as temporary:
        traced = settings.precision if settings.format == "torch_export" else FLOAT32
        with _scoring(), lowered_backbone(graph.method.backbone, traced):
            program = trace(graph)
            file = write_program(program, settings.format, temporary, settings.opset)
            del program
        exported = Exported(folder, {}, remarks=_remarks(detector, method, settings))
        exported.remarks += [
            f"{name} is the same for all images of the comparison, which proves little: give "
            f"--data.root, a folder with other images"
            for name in constant_outputs(expected)
        ]
        exported.remarks += _lower(detector, graph, settings, file)
        record, threshold = _calibration_of(detector)
        runs: dict[str, Run] = {}
        for name in track(runtimes_of(settings.format), "comparing the program with torch"):
            try:
                run = runtime.open_session(file, name, None, settings.precision).run
            except ValueError as error:
                cause = shortened(str(error).removeprefix(f"{file}: "), MAX_REASON)
                if not runs:  # the runtime that everybody has
                    raise UserError(f"{file.name}: {cause}, so that nothing was written") from None
                exported.failures[name] = cause
                continue
            runs[name] = run
            sizes = batches_of(len(images.square))
            exported.differences[name] = difference = compare(
                expected, run, images.square, sizes, record, threshold
            )
            bounds = BOUNDS if settings.precision == FLOAT32 else FINITE
            check_difference(difference, f"{file.name} in {name}", bounds)
        labelled = None if settings.images is None else labelled_images(detector, settings.images)
        if labelled is not None:
            with _scoring():
                exported.drift = measure_drift(
                    labelled, eager, runs, record, threshold, graph.method.scaled_parts
                )
        if settings.precision != FLOAT32:
            exported.remarks += _changes(exported, file.name, len(images.square))
        exported.record = _record(detector, graph, settings, file, images, expected, exported)
        write_json(temporary / RECORD, exported.record)
        source = Path(runtime.__file__).read_bytes()
        write_bytes(temporary / RUNTIME, source)
        write_bytes(temporary / "README.md", readme(exported.record).encode())
        checked = images if settings.include_images else images_of_check(detector, NUM_CHECKED)
        _write_check(temporary / "check", checked, eager)
    return exported


def _lower(
    detector: Detector, graph: DetectorGraph, settings: ExportSettings, file: Path
) -> list[str]:
    """Lower the precision of the backbone; return remarks on it."""
    if settings.precision == FLOAT32:
        return []
    remarks = [f"the precision of the frozen backbone is {settings.precision}"]
    if settings.format == "onnx":
        sources: list[str] = []

        def images() -> NDArray[np.uint8]:
            values, source = range_images(detector, settings.images)
            sources.append(f"; the ranges of their inputs are those of {source}")
            return values

        what = lower_program(file, graph.method.backbone, settings.precision, images)
        remarks = [f"{remarks[0]}: {what}{''.join(sources)}"]
    if detector.calibration is not None:
        remarks.append(
            "the calibration scores are of float32: their false-alarm rates hold as far as scores "
            "agree"
        )
    return remarks


def _changes(exported: Exported, file: str, num_images: int) -> list[str]:
    """Return warnings about a program of lower precision."""
    if exported.drift is not None:
        return exported.drift.warnings(file)
    return [NOT_MEASURED] + [
        f"{file} in {name} is not as good as torch: {difference.flips} of {num_images} decisions "
        f"differ"
        for name, difference in exported.differences.items()
        if difference.flips
    ]


def _bounds(settings: ExportSettings, differences: Iterable[Difference]) -> dict[str, float]:
    """Return the bounds of a comparison on other machines."""
    if settings.precision == FLOAT32:
        return BOUNDS
    largest = dict(BOUNDS)
    for difference in differences:
        for name in BOUNDS:
            largest[name] = max(largest[name], LOOSENED * (getattr(difference, name) or 0))
    return largest


def runtimes_of(kind: str) -> list[str]:
    """Return the runtimes at hand for a format."""
    names = ("onnxruntime", "openvino") if kind == "onnx" else ("torch",)
    return [name for name in names if importlib.util.find_spec(name) is not None]


def _check_method(method: AnomalyMethod) -> None:
    """Check that there is a program of a method on the CPU, which scores images one by one.

    Raises:
        UserError: If the method tells why not, is elsewhere, or scores images by each other.
    """
    if method.not_exportable is not None:
        raise UserError(
            f"{type(method).__name__} cannot be exported: it {method.not_exportable}; export "
            f"another method"
        )
    if method.device.type != "cpu":  # a graph would name the device
        raise UserError(
            f"the detector is on {method.device}: load it again with device='cpu', and export that"
        )
    if method.transductive:
        raise UserError(
            f"{type(method).__name__} scores images by each other, so that no program can score "
            f"the next one alone: export another method"
        )


@contextmanager
def _scoring() -> Iterator[None]:
    """Score without gradients, and restore the random numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


def _images(detector: Detector, settings: ExportSettings) -> ParityImages:
    if settings.images is None:
        return generated_images(detector, settings.num_images)
    images = images_of_folder(detector, settings.images, settings.num_images)
    if len(images.square) < NUM_CHECKED:
        raise UserError(
            f"--data.root {settings.images}: a comparison needs {NUM_CHECKED} images that can be "
            f"read, to try batches as well: add some, or leave --data.root out"
        )
    return images


def _check_finite(outputs: Arrays) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"{name} of some images is NaN or infinite in torch itself: fit again, or correct "
                f"the weights"
            )


def _calibration_of(detector: Detector) -> tuple[CategoryCalibration | None, float]:
    _, decisions = detector.resolve()
    if decisions is None:
        return None, math.nan
    [record], [level] = decisions.records.values(), decisions.levels.values()
    return record, level.threshold


def _remarks(
    detector: Detector, method: AnomalyMethod | None, settings: ExportSettings
) -> list[str]:
    remarks = []
    if detector.method.weights["random"]:
        remarks.append("the weights are random: the scores mean nothing")
    if detector.calibration is None:
        remarks.append(
            "the detector is not calibrated, so that it scores images but decides nothing: run "
            "anomaly_clip calibrate, then export again"
        )
    if method is not None:
        precision = detector.preprocessing.precision
        remarks.append(
            f"the detector scores in {precision}, its export in {settings.precision}"
            + (
                ""
                if detector.calibration is None
                else ": calibrate again with --trainer.precision 32-true, then export again, for "
                "decisions by comparable scores"
            )
        )
    return remarks


# -- detector.json ---------------------------------------------------------------------------------


def _record(
    detector: Detector,
    graph: DetectorGraph,
    settings: ExportSettings,
    file: Path,
    images: ParityImages,
    expected: Arrays,
    exported: Exported,
) -> dict[str, Any]:
    side, reading = graph.method.image_size, detector.preprocessing
    data = file.with_name(f"{file.name}.data")
    opset = (settings.opset or DEFAULT_OPSET) if settings.format == "onnx" else None
    return {
        "format": FORMAT,
        "anomaly_clip": __version__,
        "method": type(graph.method).__name__,
        "category": graph.category,
        "program": {
            **file_record(file),
            "format": settings.format,
            "opset": opset,
            "precision": settings.precision,
            "external_data": file_record(data) if data.exists() else None,
        },
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", 3, side, side],
            "colours": "RGB",
        },
        "preprocessing": {
            "image_size": side,
            "rule": reading.resize.rule,
            "size": reading.resize.size,
            "filter": reading.resize.filter,
            "bit_depth": reading.bit_depth,
            "max_pixels": reading.max_pixels,
        },
        "outputs": outputs_record(graph.method, expected),
        "calibration": calibration_record(detector),
        "parity": {
            "images": len(images.square),
            "source": images.source,
            "batches": batches_of(len(images.square)),
            "bounds": _bounds(settings, exported.differences.values()),
            "programs": {
                name: {**difference.as_dict(), "version": version_of(name)}
                for name, difference in exported.differences.items()
            },
            "failures": exported.failures,
            "drift": None if exported.drift is None else exported.drift.as_dict(),
        },
        "weights": dict(graph.method.weights),
        "remarks": exported.remarks,
        "versions": versions(),
    }


# -- other files -----------------------------------------------------------------------------------


def _write_check(folder: Path, images: ParityImages, eager: Any) -> None:
    """Write images with the outputs of torch, with which another machine can compare its own."""
    for number, image in enumerate(images.originals[:NUM_CHECKED]):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        write_bytes(folder / f"{number}.png", content.getbuffer())
    square: NDArray[np.uint8] = images.square[:NUM_CHECKED]
    with _scoring():
        outputs = eager(square)
    content = io.BytesIO()
    np.savez_compressed(content, images=square, **outputs)
    write_bytes(folder / "expected.npz", content.getbuffer())
