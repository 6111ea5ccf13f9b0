"""Run an exported anomaly detector: scores, decisions, maps and drawings of images.

It needs ``pip install numpy pillow onnxruntime``, and the folder that it is in. In a terminal,
``python detector.py photo.jpg photos/`` prints a line per image. From Python:

    from detector import Detector
    result = Detector("the/folder").predict("photo.jpg")
    result.score, result.p_value, result.decision, result.map, result.overlay()
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

__all__ = ["Detector", "Prediction", "make_square", "open_session", "read_image", "seen_part"]

AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR
KEYS = ("category", "program", "preprocessing", "outputs", "calibration", "parity", "remarks")
PATH = (str, os.PathLike)
RUNTIMES = {"onnx": ("onnxruntime", "openvino"), "torch_export": ("torch",)}
CALIBRATE = "calibrate the run with anomaly_clip calibrate, and export it again"
EXPORT = "export the detector again, or copy its whole folder again"


@dataclass(eq=False, repr=False)
class Prediction:
    """Score, decision and anomaly map of one image."""

    score: float  # higher = more anomalous; with a calibration, the one that decides
    category: str
    path: str | None = None  # None for an image in memory
    p_value: float | None = None  # conformal, in (0, 1]; None without a calibration
    decision: str | None = None  # normal or anomalous; None without a calibration
    error: str | None = None  # why the image could not be read; its score is NaN
    parts: Mapping[str, float] = field(default_factory=dict)  # of the score, by name
    map_threshold: float | None = None  # pixels with a higher map value are marked
    source: Any = None  # the image as given, for drawings
    values: NDArray[np.float32] | None = None  # anomaly map (h, w) of the square image
    size: tuple[int, int] = (0, 0)  # width and height of the image
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def map(self) -> NDArray[np.float32] | None:
        """Anomaly map, float32 ``(h, w)`` in the size of the image; NaN outside a crop."""
        return (
            None if self.values is None else _full_map(self.values, self.size, self.preprocessing)
        )

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Marked pixels, bool ``(h, w)`` in the size of the image; they decide nothing."""
        full = self.map
        return None if full is None or self.map_threshold is None else full > self.map_threshold

    def overlay(self, longest: int | None = None) -> Image.Image:
        """Return the image with contours of the marked pixels; without a threshold, a heat map.

        It is shrunk to a ``longest`` side in pixels; by default, it has the size of the image.
        """
        if self.error is not None:
            raise ValueError(f"there is no image to draw: {self.error}")
        image = _read(self.source, self.preprocessing)
        image.thumbnail((longest, longest) if longest else image.size)
        if self.values is None:
            return image
        values = _full_map(self.values, image.size, self.preprocessing)
        return Image.fromarray(_drawn(np.array(image), values, self.map_threshold))

    def show(self) -> None:
        """Show the overlay in the desktop's viewer; a notebook shows a prediction by itself."""
        self.overlay().show()

    def _repr_png_(self) -> bytes | None:
        buffer = io.BytesIO()
        with suppress(OSError, ValueError):
            self.overlay(longest=800).save(buffer, "PNG")
        return buffer.getvalue() or None

    def __repr__(self) -> str:
        """Return one line with decision, p-value, score and path."""
        if self.error is not None:
            return f"unreadable  {_printable(self.error)}"
        decided = "" if self.p_value is None else f"{self.decision:9}  p {self.p_value:<8.3g}  "
        return f"{decided}score {self.score:<10.6g}  {_printable(self.path or 'image')}"


class Detector:
    """A detector that was exported to a folder; several threads may use it at once.

    ``alpha`` is the false-alarm rate of decisions, by default that of the calibration. ``runtime``
    is ``onnxruntime`` or ``openvino`` for ONNX, and ``torch`` for a program of torch. ``bit_depth``
    is the number of bits that a camera uses of 16, if the fit had no such images.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        alpha: float | None = None,
        runtime: str | None = None,
        threads: int | None = None,
        bit_depth: int | None = None,
    ) -> None:
        path = Path(folder).expanduser()
        self.folder, self.alpha = path.parent if path.is_file() else path, alpha
        self.record = record = _read_record(self.folder / "detector.json")
        self.category, program = str(record["category"]), record["program"]
        self.calibration: Mapping[str, Any] = record["calibration"] or {}
        self.is_calibrated = bool(self.calibration)
        self._level(alpha)
        calibrated = self.calibration.get("bit_depth")
        stored = record["preprocessing"]["bit_depth"] or calibrated
        if bit_depth not in (None, *([stored] if stored else range(8, 17))):
            raise ValueError(f"bit_depth {bit_depth}: must be {stored or '8 to 16'}")
        # Images must be like those of the calibration: of 16 bits per channel, or of 8.
        kind = {"is_deep": bool(calibrated) if self.calibration else None}
        self.preprocessing = record["preprocessing"] | kind | {"bit_depth": bit_depth or stored}
        self.image_size = int(self.preprocessing["image_size"])
        runtimes = RUNTIMES[program["format"]]
        self.runtime = runtime or runtimes[0]
        if self.runtime not in runtimes:
            raise ValueError(f"runtime {runtime}: give one of {', '.join(runtimes)}")
        for part in filter(None, (program["external_data"], program)):
            file = self.folder / part["file"]
            if not file.is_file():
                raise FileNotFoundError(f"{file}: there is no such file: {EXPORT}")
            if hashlib.sha256(np.memmap(file, mode="r")).hexdigest() != part["sha256"]:
                raise ValueError(f"{file}: its SHA-256 is not that of the export: {EXPORT}")
        self._run = open_session(file, self.runtime, threads, program["precision"]).run
        for remark in record["remarks"]:
            warnings.warn(remark, stacklevel=2)

    def guarantee(self, alpha: float | None = None) -> str:
        """Return what the calibration promises of the rate of false alarms."""
        return str(self._level(alpha).get("sentence", f"not calibrated: {CALIBRATE}"))

    def _level(self, alpha: float | None) -> Mapping[str, Any]:
        """Return the threshold and the rates at a false-alarm rate; {} without a calibration."""
        rate = self.alpha if alpha is None else float(str(alpha))
        levels = {level["alpha"]: level for level in self.calibration.get("levels", [])}
        if rate is not None and rate not in levels:
            rates = f"give one of {', '.join(f'{each:g}' for each in sorted(levels))}"
            way_out = f"{rates}, or calibrate and export with this one" if levels else CALIBRATE
            raise ValueError(f"alpha {rate:g}: {self.folder} has no threshold for it: {way_out}")
        return levels[rate] if rate is not None else next(iter(levels.values()), {})

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the raw outputs for uint8 RGB images ``(B, 3, S, S)``: ``image_score`` ``(B,)``.

        Methods may also have ``anomaly_map`` ``(B, h, w)`` and ``score_parts`` ``(B, P)``.
        """
        side = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (3, side, side):
            raise ValueError(f"{images.dtype} {images.shape}: give uint8 (B, 3, {side}, {side})")
        return dict(self._run(np.ascontiguousarray(images)))

    def predict(self, images: Any, *, alpha: float | None = None, batch_size: Any = None) -> Any:
        """Return the `Prediction` of an image, or a list of those of several.

        An image is a path, a PIL image, or a uint8 array ``(H, W, 3)`` in RGB or ``(H, W)``, grey.
        Several are a list of images, or a folder. One of several that cannot be read has an
        ``error``, where a single one raises it. By default, 8 images are scored at once.
        """
        listed, is_single = _listed(images)
        results = list(self.stream(listed, alpha=alpha, batch_size=batch_size))
        if is_single and results[0].error is not None:
            raise ValueError(results[0].error)
        return results[0] if is_single else results

    def stream(
        self, images: Sequence[Any], *, alpha: float | None = None, batch_size: int | None = None
    ) -> Iterator[Prediction]:
        """Yield the predictions of a list of images, batch by batch; see `predict`."""
        level, size = self._level(alpha), 8 if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size {size}: give 1 or more")
        if level and not level["as_asked"]:
            warnings.warn(level["sentence"], stacklevel=3)
        for start in range(0, len(images), size):
            yield from self._predict(images[start : start + size], level)

    def _predict(self, images: Sequence[Any], level: Mapping[str, Any]) -> list[Prediction]:
        results, squares, how = [], [], self.preprocessing
        for source in images:
            path = os.fspath(source) if isinstance(source, PATH) else None
            result = Prediction(math.nan, self.category, path, source=source, preprocessing=how)
            results.append(result)
            try:
                image = _read(source, how)
                squares.append(_square(image, how))
                result.size = image.size
            except (OSError, ValueError) as error:
                result.error = str(error)
        outputs = self.run(np.stack(squares)) if squares else {}
        for place, result in enumerate(result for result in results if result.error is None):
            self._decide(result, {name: rows[place] for name, rows in outputs.items()}, level)
        return results

    def _decide(self, result: Prediction, row: Mapping[str, Any], level: Mapping[str, Any]) -> None:
        """Fill in a prediction from the outputs of the program for its image."""
        score, parts = float(row["image_score"]), np.ravel(row.get("score_parts", [])).tolist()
        names = self.record["outputs"].get("score_parts", {"names": []})["names"]
        result.parts = dict(zip(names, parts, strict=True))
        if "anomaly_map" in row:
            result.values = row["anomaly_map"].astype(np.float32)  # a copy
        if self.calibration.get("part_ranges"):  # scaled and not clamped
            limits = zip(parts, self.calibration["part_ranges"], strict=True)
            score = sum((part - low) / (high - low) for part, (low, high) in limits if high > low)
        result.score = score
        if math.isnan(score):  # it would be called normal
            result.error = f"{result.path or 'the image'}: its score is not a number: {EXPORT}"
        elif level:
            scores = np.array(self.calibration["scores"])
            counts = np.array(self.calibration["counts"] or [1] * len(scores))
            # Roundings must not lift the calibration image of the threshold above it.
            score -= self.calibration.get("tolerance", 0.0)
            result.p_value = float((1 + counts[scores >= score].sum()) / (counts.sum() + 1))
            result.decision = "anomalous" if score > level["threshold"] else "normal"
            result.map_threshold = self.calibration["map_threshold"]

    def check(self) -> list[str]:
        """Compare with the images and outputs in ``check/``; return what differs."""
        folder, problems = self.folder / "check", []
        expected = dict(np.load(folder / "expected.npz"))
        images = [_read(folder / f"{n}.png", self.record["preprocessing"]) for n in range(2)]
        if not np.array_equal([_square(i, self.preprocessing) for i in images], expected["images"]):
            problems.append("the images of check/ are decoded or resized to other values")
        for name, values in self.run(expected["images"]).items():
            wanted, axis = expected[name], 0 if name == "score_parts" else None
            scale = np.ptp(wanted) if name == "anomaly_map" else np.abs(wanted).max(axis)
            difference = (np.abs(values - wanted) / np.where(scale > 0, scale, 1)).max()
            if not difference <= self.record["parity"]["bounds"][name]:  # also if it is NaN
                problems.append(f"{name} differs by {difference:.2g} of its range")
        return problems


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        if record["format"] == 1:
            return record | {key: record[key] for key in KEYS}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is none: name the folder of an export") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({type(error).__name__}: {error}): {EXPORT}") from None
    raise ValueError(f"{file}: format {record['format']}, not 1: use the detector.py next to it")


def open_session(file: Path, runtime: str, threads: Any = None, precision: str = "float32") -> Any:
    """Open a program; ``run`` of the result returns the outputs of images ``(B, 3, S, S)`` by name.

    With precision ``bf16``, OpenVINO computes the backbone in 16 bits; by default, it would
    compute everything in 16 bits where it can.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads}: give 1 or more")
    try:
        module: Any = import_module(runtime)
        if runtime == "onnxruntime":
            options = module.SessionOptions()
            options.log_severity_level = 4  # errors are raised, too
            options.intra_op_num_threads = threads or 0
            session = module.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            return _session(lambda x: session.run(None, {"images": x}))
        if runtime == "openvino":
            hints: Any = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
            if precision == "bf16":
                return _session(_in_bf16(module, file, hints))
            hints["INFERENCE_PRECISION_HINT"] = "f32"
            model = module.Core().compile_model(file, "CPU", hints)
            # A request serves one thread.
            return _session(lambda x: model.create_infer_request().infer([x]).values())
        if threads is not None:
            module.set_num_threads(threads)
        program = import_module("torch.export").load(file).module()
        return _session(module.inference_mode()(lambda x: program(module.from_numpy(x))))
    except Exception as error:  # each runtime has its own kinds; or it is not installed
        reason = f"{runtime} cannot open it ({_printable(error)})"
        raise ValueError(f"{file}: {reason}: pip install --upgrade {runtime}") from None


def _in_bf16(openvino: Any, file: Path, hints: Any) -> Any:
    """Split a program at the tensors ``tower/...``: bfloat16 before them, float32 after them."""
    core, ops = openvino.Core(), import_module("openvino.opset13")
    model = core.read_model(file)
    tower: set[str] = set()
    cuts: list[Any] = []
    inputs = []
    for node in reversed(model.get_ordered_ops()):  # users come first
        for output in node.outputs():
            users = output.get_target_inputs()
            outside = [user for user in users if user.get_node().get_name() not in tower]
            is_last = any(name.startswith("tower/") for name in output.get_names())
            if is_last or len(outside) < len(users):
                tower.add(node.get_name())
                if outside and node.get_type_name() not in ("Constant", "Parameter"):
                    cuts.append(output)
                    inputs.append(ops.parameter(output.partial_shape, output.element_type))
                    for user in outside:
                        user.replace_source_output(inputs[-1].output(0))
    halves = (
        (openvino.Model([ops.result(cut) for cut in cuts], model.get_parameters()), "bf16"),
        (openvino.Model(model.get_results(), [*inputs, *model.get_parameters()]), "f32"),
    )
    before, after = (
        core.compile_model(half, "CPU", hints | {"INFERENCE_PRECISION_HINT": precision})
        for half, precision in halves
    )

    def call(images: Any) -> Any:
        tensors = before.create_infer_request().infer([images]).values()
        return after.create_infer_request().infer([*tensors, images]).values()

    return call


def _session(call: Any) -> Any:
    names = {1: "image_score", 2: "score_parts", 3: "anomaly_map"}  # by number of dimensions
    return SimpleNamespace(run=lambda x: {names[y.ndim]: np.array(y) for y in call(x)})


def make_square(image: Image.Image, size: int, rule: str, before: Any, filter: str) -> Image.Image:
    """Resize an image to ``size`` x ``size`` pixels, with antialiasing.

    Rule square resizes both sides, ignoring the aspect ratio. Before a crop of the centre,
    square_crop resizes both sides to ``before``, and shorter_crop the shorter side. The filter is
    Pillow's: bicubic, bilinear, lanczos or nearest.
    """
    width, height = _sides(image.width, image.height, size, rule, before)
    image = image.resize((width, height), Image.Resampling[filter.upper()])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image if before is None else image.crop((left, top, left + size, top + size))


def seen_part(width: int, height: int, size: int, rule: str, before: Any) -> list[int]:
    """Return the part of an image that `make_square` leaves: left, top, right, bottom in pixels."""
    starts, ends = [], []
    sides = _sides(width, height, size, rule, before)
    for length, side in zip((width, height), sides, strict=True):
        first = round((side - size) / 2)
        starts.append(min(length - 1, round(first * length / side)))
        ends.append(max(starts[-1] + 1, round((first + size) * length / side)))
    return starts + ends


def _sides(width: int, height: int, size: int, rule: str, before: Any) -> tuple[int, int]:
    if before is None or rule == "square_crop":
        return before or size, before or size
    return int(before * width / min(width, height)), int(before * height / min(width, height))


def _square(image: Image.Image, how: Mapping[str, Any]) -> NDArray[np.uint8]:
    square = make_square(image, how["image_size"], how["rule"], how["size"], how["filter"])
    return np.asarray(square).transpose(2, 0, 1)


def _full_map(values: Any, size: tuple[int, int], how: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return the map of a square image, bilinearly in the size of the image, NaN outside a crop."""
    left, top, right, bottom = seen_part(*size, how["image_size"], how["rule"], how["size"])
    full, width, height = np.full(size[::-1], np.nan, np.float32), right - left, bottom - top
    steps = (values.shape[1] / width, 0, 0, 0, values.shape[0] / height, 0)
    seen = Image.fromarray(values).transform((width, height), AFFINE, steps, BILINEAR)
    full[top:bottom, left:right] = seen
    return full


# Formats whose decoders are interpreters, such as EPS, are left out. Camera raw files begin like
# TIFF, but contain only a small preview that Pillow could read.
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "QOI", "SGI", "AVIF"]
RAW = ".3fr.arw.cr2.dng.erf.iiq.kdc.mef.mos.nef.nrw.orf.pef.raf.rw2.rwl.sr2.srf.srw."
SUFFIXES = ".png.jpg.jpeg.bmp.tif.tiff.webp.ppm.pgm.gif.avif.jp2.tga.dib.pcx."


class _Refused(ValueError):
    """An image that is not read, for a reason in one sentence."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image file; whatever its decoder raises becomes one sentence."""
    suffix = f"{path.suffix.lower()}."
    if (path.exists() and not path.is_file()) or suffix in RAW:  # a pipe would wait for ever
        raise _Refused(f"{path}: a folder, special file or camera raw file: give a PNG or JPEG")
    try:
        with path.open("rb") as file:
            # The last formats have no signature.
            yield Image.open(file, formats=FORMATS + [suffix[1:-1]] * (suffix in ".tga.dib.pcx."))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file: correct the path") from None
    except (MemoryError, _Refused):
        raise
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise _Refused(f"{path}: it cannot be decoded ({reason}): give a PNG or JPEG") from None


def _read(source: Any, how: Mapping[str, Any]) -> Image.Image:
    """Decode an image that a caller gave to RGB."""
    if isinstance(source, PATH):
        return read_image(
            Path(source).expanduser(), how["bit_depth"], how["max_pixels"], how.get("is_deep")
        )
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        source = ImageOps.exif_transpose(source)
    return source.convert("RGB")


def read_image(
    path: Path, bit_depth: int | None, max_pixels: int, is_deep: bool | None = None
) -> Image.Image:
    """Decode an image of any common format to RGB, the right way up, without transparency.

    Values of 16 bits are scaled so that the highest one of ``bit_depth`` bits becomes 255; without
    a ``bit_depth``, they are refused, and so are files with more pixels, or of another depth.
    """
    with _opened(path) as image:
        deep, declared = _depth(image)
        bits = declared or bit_depth or 16
        planes = image.format == "TIFF" and image.tag_v2.get(284) == 2 and (deep or declared)
        for is_wrong, reason in (
            (image.width * image.height > max_pixels, f"{image.size} exceed {max_pixels} pixels"),
            (image.mode == "F", "floating-point values: save it with 8 or 16 bits"),
            (planes, "separate planes of 16 bits: save it as PNG"),
            (deep and bit_depth is None, "how many of its 16 bits are used? Give bit_depth, 8..16"),
            (is_deep not in (None, deep), f"{16 if deep else 8} bits per channel, unlike the "
             f"calibration images: calibrate on images of this camera, and export again"),
        ):  # fmt: skip
            if is_wrong:
                raise _Refused(f"{path}: {reason}")
        if image.mode[0] == "I":
            return _scaled(path, np.asarray(_upright(image)), bits)
        if deep and bits < 16:
            return _scaled(path, _colours16(path, image), bits)
        return _upright(image).convert("RGB")  # of 16 bits, Pillow keeps the high byte


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _depth(image: Any) -> tuple[bool, int | None]:
    """Return whether channels have 16 bits, and between 8 and 16 bits that the file declares."""
    arguments = image.tile[0][3] if image.tile else ""
    if image.format == "TIFF":
        bits = int(np.max(image.tag_v2.get(258, 8)))
        return bits == 16, bits if 8 < bits < 16 else None
    if image.format == "PPM" and image.mode == "I" and arguments[1] != 65535:
        return False, 16  # Pillow scales other maxima to 16 bits
    is_deep = image.mode[0] == "I" or str(arguments).endswith(";16B")
    return is_deep or arguments == ("RGB", 65535), None


def _colours16(path: Path, image: Any) -> NDArray[np.uint16]:
    """Decode colours of 16 bits to ``(H, W, 3)``.

    Of each value, Pillow keeps the high byte; the low one, if it expects the other order of bytes.
    """
    with path.open("rb") as file:
        low: Any = Image.open(file, formats=[image.format])
        for place, tile in enumerate(low.tile):
            raw, *others = [tile.args] if isinstance(tile.args, str) else tile.args
            mode, _, order = raw.partition(";16")
            if tile.codec_name == "ppm":
                values = np.frombuffer(file.read(), ">u2", 3 * low.width * low.height)
                return values.reshape(low.height, low.width, 3)
            if mode not in ("RGB", "RGBA", "RGBX", "LA") or not order:
                raise _Refused(f"{path}: colours of 16 bits of a rare kind: save it as PNG")
            swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[order]
            raw = "RGBA" if mode == "LA" else f"{mode};16{swapped}"  # of LA, all four bytes
            low.tile[place] = tile._replace(args=(raw, *others) if others else raw)
        lows = np.asarray(_upright(low))
    if mode == "LA":
        return np.repeat(lows[..., :1] * np.uint16(256) + lows[..., 1:2], 3, axis=2)
    return np.asarray(_upright(image))[..., :3] * np.uint16(256) + lows[..., :3]


def _scaled(path: Path, values: NDArray[Any], bits: int) -> Image.Image:
    """Scale values so that the highest value of ``bits`` bits becomes 255."""
    full, lowest, highest = 2**bits - 1, int(values.min()), int(values.max())
    if lowest < 0 or highest > full:
        raise _Refused(f"{path}: values from {lowest} to {highest}, but {bits} bits end at {full}: "
                       f"fit, calibrate and export with their bit depth")  # fmt: skip
    table = ((np.arange(full + 1) * 255 + full // 2) // full).astype(np.uint8)
    return Image.fromarray(table[values]).convert("RGB")


def _drawn(pixels: Any, values: NDArray[np.float32], threshold: float | None) -> NDArray[np.uint8]:
    """Draw contours of the pixels above a threshold, or a heat map over the range of the map."""
    if threshold is None:
        seen = np.isfinite(values)
        heat = (values[seen] - values[seen].min())[:, None] / (np.ptp(values[seen]) or 1)
        colours = (3 * heat - (0, 1, 2)).clip(0, 1) * 255  # black, red, yellow, white
        pixels[seen] = (pixels[seen] / 2 + colours / 2).round()
        return pixels
    marked = np.pad(values > threshold, 1)
    inner = marked[:-2, 1:-1] & marked[2:, 1:-1] & marked[1:-1, :-2] & marked[1:-1, 2:]
    width = max(1, round(max(values.shape) / 320))
    line = _grown(marked[1:-1, 1:-1] & ~inner, width // 2)
    pixels[_grown(line, max(1, width // 2))] = 0, 0, 0  # on both sides of the contour
    pixels[line] = 0, 255, 255  # rare on products and on tissue
    return pixels


def _grown(marked: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    blurred = Image.fromarray(marked).convert("L").filter(ImageFilter.BoxBlur(steps))
    return np.asarray(blurred) > 0


def _listed(images: Any) -> tuple[list[Any], bool]:
    """Return the images that a caller gave, and whether there is only one."""
    if isinstance(images, PATH):
        path = Path(images).expanduser()
        if not path.is_dir() and not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file: correct the path")
        if path.is_dir():
            inner = [(each, str(each.relative_to(path))) for each in path.rglob("*")]
            listed = [each for each, name in inner if name[0] != "." and _is_image(each)]
            if not listed:
                raise ValueError(f"{path}: there is no image in this folder: correct the path")
            return sorted(listed), False
    kinds = (*PATH, Image.Image, np.ndarray)
    is_single = isinstance(images, kinds) or not hasattr(images, "__iter__")
    listed = [images] if is_single else list(images)
    for place, image in enumerate(listed):
        is_right = isinstance(image, kinds)
        if isinstance(image, np.ndarray):
            is_right = image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and image.size > 0
            listed[place] = image.copy()  # cameras write into the same array again
        if isinstance(image, Image.Image):
            is_right = image.mode[0] not in "IF" and 0 not in image.size
        if not is_right:
            kind = f"{type(image).__name__} {getattr(image, 'shape', '')}"
            raise ValueError(f"{kind}: give a path, a PIL image of 8 bits, or uint8 (H, W, 3)")
    return listed, is_single


def _is_image(path: Path) -> bool:
    return path.suffix != "" and f"{path.suffix.lower()}." in SUFFIXES


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, or 1 for unreadable images, 2 for mistakes, or 3."""
    parser = argparse.ArgumentParser(description="Print decision, p-value and score of images.")
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--alpha", type=float, help="false-alarm rate of decisions")
    parser.add_argument("--overlays", type=Path, help="folder for drawings of anomalous images")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--csv", type=Path, help="file for the results")
    parser.add_argument("--threads", type=int, help="threads of the runtime")
    parser.add_argument("--batch_size", type=int, help="images that are scored at once")
    parser.add_argument("--runtime", help="onnxruntime, openvino or torch")
    parser.add_argument("--bit_depth", type=int, help="bits of 16-bit images, if the fit had none")
    parser.add_argument("--check", action="store_true", help="compare with the export's outputs")
    parser.add_argument("--fail_on", choices=["anomalous"], help="exit with 3 if an image is")
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(options)
    except (OSError, ValueError) as error:
        print(f"error: {_printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    names = ("alpha", "runtime", "threads", "bit_depth")
    detector = Detector(Path(__file__).parent, **{name: getattr(options, name) for name in names})
    images = [image for given in options.images for image in _listed(given)[0]]
    if not images and not options.check:
        raise ValueError("no image was given: name images or folders")
    problems = detector.check() if options.check else []
    notes = detector.record["remarks"] + [detector.guarantee()] * detector.is_calibrated
    print(*(f"check: {problem}" for problem in problems), *notes, sep="\n", file=sys.stderr)
    columns, rows = ("path", "decision", "p_value", "score", "error"), []
    for result in detector.stream(images, batch_size=options.batch_size):
        print(repr(result), flush=True)
        rows.append([getattr(result, name) for name in columns])
        if options.overlays and result.error is None and result.decision != "normal":
            options.overlays.mkdir(parents=True, exist_ok=True)
            name = f"{len(rows):05}_{Path(str(result.path)).stem}.png"
            result.overlay().save(options.overlays / name)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    content = json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1)
    for file, text in (
        (options.json, content.replace("NaN", "null")),
        (options.csv, table.getvalue()),
    ):
        if file is not None:
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
    if problems or any(row[-1] for row in rows):
        return 1
    return 3 if options.fail_on and any(row[1] == options.fail_on for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
