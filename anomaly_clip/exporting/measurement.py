"""Programs of a detector, or of an exported folder, and their differences and decisions."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.reading_errors import UnreadableError, UnreadableImage
from anomaly_clip.data.transforms import Resize, resize_image
from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError, explain, reason
from anomaly_clip.exporting.exporter import ExportSettings, export_detector
from anomaly_clip.exporting.folder import RECORD
from anomaly_clip.exporting.graph import OUTPUTS, DetectorGraph
from anomaly_clip.exporting.parity import (
    Arrays,
    Difference,
    compare,
    decision_scores,
    eager_run,
    outputs_of,
)
from anomaly_clip.exporting.parity_images import generated_images, images_of_folder
from anomaly_clip.exporting.programs import FORMATS, file_record
from anomaly_clip.exporting.timing import Program, Timing
from anomaly_clip.image_inputs import ImageInputs
from anomaly_clip.images import evenly_spaced
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.preprocessing import Preprocessing
from anomaly_clip.progress import number_of

__all__ = ["RUNTIMES", "ImageTime", "Subject", "subject_of_detector", "subject_of_folder"]

RUNTIMES = ("torch", "torch_export", "onnxruntime", "openvino")
"""Runtimes in the order of the table; the first is the method itself."""
FORMAT_OF = {"torch_export": "torch_export", "onnxruntime": "onnx", "openvino": "onnx"}
SESSION_OF = {"torch_export": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
PACKAGE_OF = {"torch": "torch", "torch_export": "torch"}
FORMAT = 1
"""Newest form of ``detector.json`` that is read."""
KEYS = ("method", "category", "remarks")
"""Keys of ``detector.json`` that are read, besides its format and those of its parts."""
PARTS = {
    "program": ("file", "sha256", "bytes", "format", "precision", "external_data"),
    "preprocessing": ("image_size", "rule", "size", "filter", "bit_depth", "max_pixels"),
    "calibration": ("part_ranges", "levels"),
}
"""Keys of its parts that are read; the calibration may be missing."""
PHOTOGRAPH_SIDE = 1024
"""Side of the generated photograph whose decoding is timed, in pixels."""
REPEATS = 3
FEWEST = 2
"""Images on which an export is compared with torch before it is measured on more."""


@dataclass(frozen=True)
class ImageTime:
    """Time to decode and resize an image, which each runtime needs as well.

    Args:
        seconds: Median.
        images: Description of the images.
    """

    seconds: float
    images: str


@dataclass
class Subject:
    """Programs to measure, images, and what their outputs are compared with.

    Args:
        method: Name of the method.
        category: Category of the images.
        programs: The programs.
        images: uint8 ``(N, 3, S, S)``.
        source: Description of the images.
        reading: Time to decode and resize.
        calibration: That of ``detector.json``; None without one.
        expected: Outputs that rows are compared with; those of fewer than N images are of the
            first ones.
        reference: Description of these outputs.
        remarks: Remarks for the user.
    """

    method: str
    category: str
    programs: list[Program]
    images: NDArray[np.uint8]
    source: str
    reading: ImageTime
    calibration: Mapping[str, Any] | None
    expected: Arrays
    reference: str
    remarks: list[str] = field(default_factory=list)

    def differences(self, row: Timing) -> Difference | None:
        """Return the largest differences of a row; None after an error, or without a reference."""
        if row.error is not None or not self.expected:
            return None
        count = len(next(iter(self.expected.values())))
        outputs = {name: values[:count] for name, values in row.outputs.items()}
        difference = compare(self.expected, lambda images: outputs, self.images[:count], [count])
        if self.calibration is None:
            return difference
        # Roundings must not lift the calibration image of the threshold above it; see ``parity``.
        is_torch = row.program.runtime == "torch"
        tolerance = 0.0 if is_torch else self.calibration.get("tolerance", 0.0)
        flips = self._decided(self.expected) != self._decided(outputs, tolerance)
        return Difference(**{**asdict(difference), "flips": int(flips.sum())})

    def _decided(self, outputs: Arrays, tolerance: float = 0.0) -> NDArray[np.bool_]:
        """Return whether each image ``(N,)`` is anomalous at the first rate of the calibration."""
        assert self.calibration is not None
        scores = decision_scores(outputs, self.calibration["part_ranges"])
        threshold = self.calibration["levels"][0]["threshold"]
        anomalous: NDArray[np.bool_] = scores - tolerance > threshold
        return anomalous


def subject_of_detector(
    detector: Detector,
    job: Mapping[str, Any],
    scratch: Path,
    runtimes: Sequence[str],
    count: int,
    root: Path | None = None,
    method: AnomalyMethod | None = None,
) -> Subject:
    """Export a detector into a temporary folder, and return what is measured.

    A format that cannot be written is a row with its reason.

    Args:
        detector: The detector, on the CPU.
        job: ``loader`` and ``source`` with which another process loads the same detector.
        scratch: Folder for the exported ones.
        runtimes: Some of :data:`RUNTIMES`.
        count: Number of images.
        root: Folder of images; None: generated ones.
        method: The detector's method in float32, if the detector scores in another precision.

    Raises:
        UserError: If the images cannot be read.
    """
    if root is None:
        images = generated_images(detector, count)
    else:
        images = images_of_folder(detector, root, count)
    category, _ = detector.resolve()
    graph = DetectorGraph(detector.method if method is None else method, category)
    expected = outputs_of(eager_run(graph), images.square, len(images.square))
    programs, remarks = [], []
    calibration: Mapping[str, Any] | None = None
    if "torch" in runtimes:
        precision = "float32" if method is None else detector.preprocessing.precision
        programs.append(Program("torch", precision, {**job, "category": category}))
    for kind in FORMATS:
        names = [name for name in runtimes if FORMAT_OF.get(name) == kind]
        if not names:
            continue
        folder = scratch / kind
        try:
            settings = ExportSettings(kind, num_images=FEWEST)
            exported = export_detector(detector, folder, settings, method)
        except (UserError, OSError, ValueError) as error:
            why = str(error) if isinstance(error, UserError) else explain(error)
            programs += [Program(name, "float32", error=why) for name in names]
            continue
        remarks += [remark for remark in exported.remarks if remark not in remarks]
        calibration = exported.record["calibration"]
        programs += _programs(exported.record, folder, names)
    order = {name: place for place, name in enumerate(RUNTIMES)}
    programs.sort(key=lambda program: order[program.runtime])
    return Subject(
        type(detector.method).__name__,
        category,
        programs,
        images.square,
        _description(len(images.square), root),
        _time_of_reading(root, category, detector.method.image_size, detector.preprocessing),
        calibration,
        expected,
        "torch",
        remarks,
    )


def subject_of_folder(
    folder: Path, runtimes: Sequence[str], count: int, root: Path | None = None
) -> Subject:
    """Return what is measured of an exported folder.

    The outputs of torch that it has, those of ``check/``, are of its first two images; for the
    others, rows are compared with the first one in float32.

    Args:
        folder: A folder with ``detector.json``.
        runtimes: Some of :data:`RUNTIMES`.
        count: Number of images besides those of ``check/``.
        root: Folder of images; None: generated ones.

    Raises:
        UserError: If the folder is damaged, or the images cannot be read.
    """
    record, expected = _contents(folder)
    checked = expected.pop("images")
    reading = record["preprocessing"]
    resize = Resize(reading["rule"], reading["size"], reading["filter"])
    preprocessing = Preprocessing(resize, reading["bit_depth"], reading["max_pixels"])
    category, side = record["category"], reading["image_size"]
    if root is None:
        photographs = [_photograph(number, 2 * side) for number in range(count)]
        squares = np.stack([resize_image(image, side, resize) for image in photographs])
        squares = squares.transpose(0, 3, 1, 2)
    else:
        squares = _squares(root, category, side, preprocessing, count)
    here = "torch_export" if record["program"]["format"] == "torch_export" else "onnx"
    programs = []
    for name in runtimes:
        if FORMAT_OF.get(name) == here:
            programs += _programs(record, folder, [name])
        else:
            holds = record["program"]["file"]
            why = f"the folder holds {holds} only: give the run that it was exported from"
            programs.append(Program(name, "float32", error=why))
    return Subject(
        record["method"],
        category,
        programs,
        np.ascontiguousarray(np.concatenate([checked, squares])),
        f"the {len(checked)} of check/ and {_description(len(squares), root)}",
        _time_of_reading(root, category, side, preprocessing),
        record["calibration"],
        expected,
        "torch, whose outputs are in check/",
        list(record["remarks"]),
    )


def _contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``detector.json`` and the arrays in ``check/``.

    Raises:
        UserError: If they are missing, damaged, or of a newer version.
    """
    file = folder / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(
                f"{file} has format {record['format']}, but this version reads format {FORMAT}: "
                f"update anomaly_clip, or export the detector again"
            )
        _check_keys(record)
        file = folder / "check" / "expected.npz"
        with np.load(file) as content:
            expected = {name: content[name] for name in ("images", "image_score")}
            expected |= {name: content[name] for name in OUTPUTS if name in content}
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(
            f"{file} is missing or damaged ({type(error).__name__}: {reason(error)}): export the "
            f"detector again"
        ) from None
    return record, expected


def _check_keys(record: Mapping[str, Any]) -> None:
    missing = [name for name in (*KEYS, *PARTS) if name not in record]
    for part, names in PARTS.items():
        if not missing and (part, record[part]) != ("calibration", None):
            missing = [f"{part}.{name}" for name in names if name not in record[part]]
    if missing:
        raise ValueError(f"{missing[0]} is missing")


def _programs(record: Mapping[str, Any], folder: Path, runtimes: Sequence[str]) -> list[Program]:
    program = record["program"]
    files = [file for file in (program, program["external_data"]) if file is not None]
    size = sum(file["bytes"] for file in files)
    damage = None
    for file in files:
        path = folder / file["file"]
        if not path.is_file() or file_record(path)["sha256"] != file["sha256"]:
            damage = f"{path}: missing, or not the file of the export: export the detector again"
    programs = []
    for name in runtimes:
        error = damage
        if importlib.util.find_spec(PACKAGE_OF.get(name, name)) is None:
            error = f"the package {name} is not installed: pip install {name}"
        job = {
            "file": str(folder / program["file"]),
            "session": SESSION_OF[name],
            "precision": program["precision"],
        }
        programs.append(Program(name, program["precision"], job, size, error))
    return programs


# -- images ----------------------------------------------------------------------------------------


def _description(count: int, root: Path | None) -> str:
    if root is None:
        return number_of(count, "generated image")
    return f"{number_of(count, 'image')} of {root}"


def _photograph(number: int, side: int) -> NDArray[np.uint8]:
    names = sorted(CATEGORIES)
    return draw_photograph(names[number % len(names)], 0, number, None, side).image


def _squares(
    root: Path, category: str, side: int, preprocessing: Preprocessing, count: int
) -> NDArray[np.uint8]:
    """Read images of a folder as ``predict`` does, to uint8 ``(N, 3, S, S)``."""
    inputs = ImageInputs(root, category)
    bits, _ = inputs.depth(preprocessing.bit_depth)
    dataset = inputs.dataset(side, preprocessing, bits)
    places = evenly_spaced(count, len(dataset))
    try:
        batch = dataset.collate([dataset[place] for place in places])
    except UnreadableError as error:
        raise UserError(error.reason) from None
    squares: NDArray[np.uint8] = batch["image"].numpy()
    if not len(squares):
        raise UserError(f"--data.root {root}: none of its images can be read: correct the path")
    return squares


def _time_of_reading(
    root: Path | None, category: str, side: int, preprocessing: Preprocessing, count: int = 8
) -> ImageTime:
    """Measure how long decoding and resizing of an image take."""
    with tempfile.TemporaryDirectory() as scratch:
        source = root
        if source is None:
            source = Path(scratch, "photograph.png")
            Image.fromarray(_photograph(0, PHOTOGRAPH_SIDE)).save(source)
        inputs = ImageInputs(source, category)
        bits, _ = inputs.depth(preprocessing.bit_depth)
        dataset = inputs.dataset(side, preprocessing, bits)
        places = [
            place
            for place in evenly_spaced(count, len(dataset))
            if not isinstance(dataset[place], UnreadableImage)
        ]
        if not places:
            raise UserError(
                f"--data.root {root}: none of {count} images across it can be read: remove the "
                f"damaged ones"
            )
        times = []
        for place in places * REPEATS:
            begin = time.perf_counter()
            dataset[place]
            times.append(time.perf_counter() - begin)
        height, width = inputs.size(places[0])
    kind = "a generated PNG" if root is None else "such as the first image"
    return ImageTime(statistics.median(times), f"{kind}, {width} x {height} pixels")
