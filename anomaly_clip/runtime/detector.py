"""Run an exported anomaly detector, which needs its folder, numpy, Pillow and onnxruntime.

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
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError, __version__

__all__ = ["Detector", "Prediction", "make_square", "open_session", "read_image", "seen_part"]

PATH = (str, os.PathLike)
RUNTIMES = {"onnx": ("onnxruntime", "openvino"), "torch_export": ("torch",)}
CALIBRATE = "calibrate the run with anomaly_clip calibrate, and export it again"
EXPORT = "export the detector again, or copy its whole folder again"
# No decoders that are interpreters, such as EPS's; and Pillow reads only the preview in raw files.
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "QOI", "SGI", "AVIF"]
RAW = "3fr arw cr2 dng erf iiq kdc mef mos nef nrw orf pef raf rw2 rwl sr2 srf srw"
SYSTEMS_OR_MASKS = re.compile(r"(^|/)([.@$]|__|(ground_?truth|masks?|gt)/)", re.IGNORECASE)
SUFFIXES = "png jpg jpeg jfif bmp tif tiff webp ppm pgm pbm gif avif jp2 heic qoi sgi tga dib pcx"


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
    how: Mapping[str, Any] = field(default_factory=dict)  # the preprocessing

    @property
    def map(self) -> NDArray[np.float32] | None:
        """Anomaly map, float32 ``(h, w)`` in the size of the image; NaN outside a crop."""
        return None if self.values is None else _full_map(self.values, self.size, self.how)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Marked pixels, bool ``(h, w)`` in the size of the image; they decide nothing."""
        full = self.map
        return None if full is None or self.map_threshold is None else full > self.map_threshold

    def overlay(self, longest: int | None = None) -> Image.Image:
        """Return the image, at most ``longest`` pixels, with contours or, unmarked, a heat map."""
        if self.error is not None:
            raise ValueError(f"there is no image to draw: {self.error}")
        image = _read(self.source, self.how)
        image.thumbnail((longest, longest) if longest else image.size)
        if self.values is None:
            return image
        values = _full_map(self.values, image.size, self.how)
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

    Decisions have the false-alarm rate ``alpha``. A ``runtime`` is ``onnxruntime``, ``openvino`` or
    ``torch``. Of the 16 bits of its images, a camera may use ``bit_depth``.
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
        self.folder, self.alpha = path if path.is_dir() else path.parent, alpha
        file = self.folder / "detector.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is none: name the folder of an export")
        try:
            self.record = record = json.loads(file.read_text(encoding="utf-8"))
            if record["format"] > 1:
                raise ValueError(f"{file}: a newer format: use the detector.py next to it")
            self.category, program = str(record["category"]), record["program"]
            self.calibration: Mapping[str, Any] = record["calibration"] or {}
            calibrated, how = self.calibration.get("bit_depth"), dict(record["preprocessing"])
            files = [part for part in (program["external_data"], program) if part]
            runtimes, self.image_size = RUNTIMES[program["format"]], int(how["image_size"])
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: damaged ({error!r}): {EXPORT}") from None
        self.is_calibrated, self.remarks = bool(self.calibration), [*record["remarks"]]
        pillow = record.get("versions", {}).get("pillow", __version__)
        if pillow.split(".")[0] != __version__.split(".")[0]:  # it may resize differently
            self.remarks.append(f"Pillow {__version__}, not {pillow} as at the export: see --check")
        self._level(alpha)
        stored = how["bit_depth"] or calibrated
        if bit_depth not in (None, *([stored] if stored else range(8, 17))):
            raise ValueError(f"bit_depth {bit_depth}: must be {stored or '8 to 16'}")
        how["bit_depth"] = bit_depth or stored
        how["is_deep"] = bool(calibrated) if self.calibration else None  # as for the calibration
        self._shape = self.image_size, how["rule"], how["size"], how["filter"]
        self.preprocessing, self.runtime = how, runtime or runtimes[0]
        if self.runtime not in runtimes:
            raise ValueError(f"runtime {runtime}: give one of {', '.join(runtimes)}")
        for part in files:
            file = self.folder / part["file"]
            content: Any = np.memmap(file, mode="r") if file.is_file() else b""
            if hashlib.sha256(content).hexdigest() != part["sha256"]:
                raise ValueError(f"{file}: missing, or not the file of the export: {EXPORT}")
        self._run = open_session(file, self.runtime, threads, program["precision"]).run
        for remark in self.remarks:
            warnings.warn(remark, stacklevel=2)

    def guarantee(self, alpha: float | None = None) -> str:
        """Return what the calibration promises of the rate of false alarms."""
        return str(self._level(alpha).get("sentence", f"not calibrated: {CALIBRATE}"))

    def _level(self, alpha: float | None) -> Mapping[str, Any]:  # threshold and rates, if any
        rate = self.alpha if alpha is None else float(str(alpha))
        levels = {level["alpha"]: level for level in self.calibration.get("levels", [])}
        if rate is not None and rate not in levels:
            way_out = f"give one of {', '.join(map(str, sorted(levels)))}" if levels else CALIBRATE
            raise ValueError(f"alpha {rate:g}: {self.folder} has no threshold for it: {way_out}")
        return levels[rate] if rate is not None else next(iter(levels.values()), {})

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return scores ``(B,)``, maps ``(B, h, w)``, parts of RGB images ``(B, 3, S, S)``, raw."""
        side = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (3, side, side):
            raise ValueError(f"{images.dtype} {images.shape}: give uint8 (B, 3, {side}, {side})")
        return dict(self._run(np.ascontiguousarray(images)))

    def predict(self, images: Any, *, alpha: float | None = None, batch_size: Any = None) -> Any:
        """Return the `Prediction` of an image, or a list of those of several.

        An image is a path, a PIL image, or a uint8 array ``(H, W, 3)`` in RGB or ``(H, W)``, grey;
        several are a list or a folder. An unreadable one has an ``error``; a single one raises it.
        """
        listed, is_single = _listed(images)
        results = list(self.stream(listed, alpha, batch_size))
        if is_single and results[0].error is not None:
            raise ValueError(results[0].error)
        return results[0] if is_single else results

    def stream(self, images: Any, alpha: Any = None, size: Any = None) -> Iterator[Prediction]:
        """Yield the predictions of a list of images, batch by batch; see `predict`."""
        level, size = self._level(alpha), 8 if size is None else size
        if size < 1:
            raise ValueError(f"batch_size {size}: give 1 or more")
        if level and not level["as_asked"]:
            warnings.warn(level["sentence"], stacklevel=3)
        for start in range(0, len(images), size):
            results, squares = [], []
            for source in images[start : start + size]:
                path = os.fspath(source) if isinstance(source, PATH) else None
                results.append(result := Prediction(math.nan, self.category, path, source=source))
                try:
                    image, result.how = _read(source, self.preprocessing), self.preprocessing
                    squares.append(np.asarray(make_square(image, *self._shape)).transpose(2, 0, 1))
                    result.size = image.size
                except (OSError, ValueError) as error:
                    result.error = str(error)
            outputs = self.run(np.stack(squares)) if squares else {}
            for row, result in enumerate(each for each in results if each.error is None):
                self._decide(result, {name: rows[row] for name, rows in outputs.items()}, level)
            yield from results

    def _decide(self, result: Prediction, row: Mapping[str, Any], level: Mapping[str, Any]) -> None:
        parts = np.ravel(row.get("score_parts", [])).tolist()
        names = self.record["outputs"].get("score_parts", {"names": []})["names"]
        result.score, result.parts = float(row["image_score"]), dict(zip(names, parts, strict=True))
        result.values = np.array(row["anomaly_map"], np.float32) if "anomaly_map" in row else None
        if level and self.calibration["part_ranges"] is not None:  # scaled and not clamped
            limits = zip(parts, self.calibration["part_ranges"], strict=True)
            result.score = float(sum((x - low) / (up - low) for x, (low, up) in limits if up > low))
        if math.isnan(result.score):  # it would be called normal
            result.error = f"{result.path or 'the image'}: its score is not a number: {EXPORT}"
        elif level:
            scores = np.array(self.calibration["scores"])
            counts = np.array(self.calibration["counts"] or [1] * len(scores))
            score = result.score - self.calibration.get("tolerance", 0.0)  # of roundings
            result.p_value = float((1 + counts[scores >= score].sum()) / (counts.sum() + 1))
            result.decision = "anomalous" if score > level["threshold"] else "normal"
            result.map_threshold = self.calibration["map_threshold"]

    def check(self) -> list[str]:
        """Compare with the images and outputs in ``check/``; return what differs."""
        folder, problems, versions = self.folder / "check", [], self.record["versions"]
        expected = dict(np.load(folder / "expected.npz"))
        images = [_read(folder / f"{n}.png", self.record["preprocessing"]) for n in range(2)]
        squares: Any = np.stack([np.asarray(make_square(i, *self._shape)) for i in images])
        if not np.array_equal(squares.transpose(0, 3, 1, 2), expected["images"]):
            problems.append(f"images decoded or resized otherwise: use Pillow {versions['pillow']}")
        for name, values in self.run(expected["images"]).items():
            target = expected[name]
            scale = np.ptp(target) if name == "anomaly_map" else np.abs(target).max(axis=0)
            difference = (np.abs(values - target) / np.where(scale > 0, scale, 1)).max()
            if not difference <= self.record["parity"]["bounds"][name]:  # also if it is NaN
                problems.append(f"{name} differs by {difference:.2g} of its range")
        return problems


def open_session(file: Path, runtime: str, threads: Any = None, precision: str = "float32") -> Any:
    """Open a program; ``run`` of the result takes images ``(B, 3, S, S)``; see `Detector.run`."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads}: give 1 or more")
    try:
        module: Any = import_module(runtime)
        if runtime == "onnxruntime":
            options = module.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, threads or 0
            session = module.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            return _session(lambda x: session.run(None, {"images": x}))
        if runtime == "openvino":
            hints: Any = {"INFERENCE_PRECISION_HINT": precision if precision == "bf16" else "f32"}
            hints |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
            net = module.Core().compile_model(file, "CPU", hints)  # a request serves one thread
            return _session(lambda x: map(np.array, net.create_infer_request().infer([x]).values()))
        module.set_num_threads(threads or module.get_num_threads())
        program = import_module("torch.export").load(file).module()
        call = module.inference_mode()(lambda x: program(module.from_numpy(x)))
        return _session(lambda x: [output.numpy() for output in call(x)])
    except Exception as error:  # each runtime has its own kinds; or it is not installed
        reason = f"{runtime} cannot open it ({_printable(error)})"
        raise ValueError(f"{file}: {reason}: pip install --upgrade {runtime}") from None


def _session(call: Any) -> Any:
    names = {1: "image_score", 2: "score_parts", 3: "anomaly_map"}  # by number of dimensions
    return SimpleNamespace(run=lambda x: {names[y.ndim]: y for y in call(x)})


def make_square(image: Image.Image, size: int, rule: str, before: Any, filter: str) -> Image.Image:
    """Resize to a square; before a crop, square_crop makes both sides ``before``, others one."""
    width, height = _sides(image.width, image.height, size, rule, before)
    image = image.resize((width, height), Image.Resampling[filter.upper()])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image if before is None else image.crop((left, top, left + size, top + size))


def seen_part(width: int, height: int, size: int, rule: str, before: Any) -> list[int]:
    """Return the part of an image that `make_square` leaves: left, top, right, bottom in pixels."""
    starts, ends, sides = [], [], _sides(width, height, size, rule, before)
    for length, side in zip((width, height), sides, strict=True):
        first = round((side - size) / 2)
        starts.append(min(length - 1, round(first * length / side)))
        ends.append(max(starts[-1] + 1, round((first + size) * length / side)))
    return starts + ends


def _sides(width: int, height: int, size: int, rule: str, before: Any) -> tuple[int, int]:
    if before is None or rule == "square_crop":
        return before or size, before or size
    return int(before * width / min(width, height)), int(before * height / min(width, height))


def _full_map(values: Any, size: tuple[int, int], how: Mapping[str, Any]) -> NDArray[np.float32]:
    left, top, right, bottom = seen_part(*size, how["image_size"], how["rule"], how["size"])
    full, width, height = np.full(size[::-1], np.nan, np.float32), right - left, bottom - top
    steps = (values.shape[1] / width, 0, 0, 0, values.shape[0] / height, 0)
    kinds = Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR  # without antialiasing
    full[top:bottom, left:right] = Image.fromarray(values).transform((width, height), *kinds)
    return full


def _read(source: Any, how: Mapping[str, Any]) -> Image.Image:
    if isinstance(source, PATH):
        path, limits = Path(source).expanduser(), (how["bit_depth"], how["max_pixels"])
        return read_image(path, *limits, how.get("is_deep"))
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        source = ImageOps.exif_transpose(source)
    return source.convert("RGB")


def read_image(path: Path, bit_depth: Any, max_pixels: int, is_deep: Any = None) -> Image.Image:
    """Decode a file to RGB, upright, opaque; the highest value of ``bit_depth`` becomes 255."""
    suffix, way_out = path.suffix.lower()[1:], "replace it, or save it as PNG or JPEG"
    try:
        if not path.is_file() or suffix in RAW.split():  # opening a named pipe would wait for ever
            raise ValueError("missing, not a file, or a camera raw file")
        with path.open("rb") as file:
            image: Any = Image.open(file, formats=[*FORMATS, *({suffix} & {"tga", "dib", "pcx"})])
            deep, declared = _depth(image)
            bits = declared or bit_depth or 16
            planes = image.format == "TIFF" and image.tag_v2.get(284) == 2 and (deep or declared)
            if image.width * image.height > max_pixels or image.mode == "F" or planes:
                raise ValueError(f"more than {max_pixels} pixels, floats, or 16 bits in planes")
            if is_deep not in (None, deep) or (deep and bit_depth is None):
                way_out = "give bit_depth, 8 to 16" if is_deep is None else CALIBRATE
                raise ValueError(f"{16 if deep else 8} bits per channel, unlike those of the fit")
            if image.mode[0] == "I":
                values = np.asarray(_upright(image))
            elif deep and bits < 16:
                values = _colours16(file, image)
            else:
                return _upright(image).convert("RGB")  # of 16 bits, Pillow keeps the high byte
            highest, full = int(values.max()), 2**bits - 1
            if highest > full or values.min() < 0:
                way_out = "fit, calibrate and export with a higher data.bit_depth"
                raise ValueError(f"values up to {highest}, but {bits} bits end at {full}")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = "no image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: cannot be read ({reason}): {way_out}") from None
    table = ((np.arange(full + 1) * 255 + full // 2) // full).astype(np.uint8)
    return Image.fromarray(table[values]).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _depth(image: Any) -> tuple[bool, int | None]:  # 16 bits per channel? How many are declared?
    arguments = image.tile[0][3] if image.tile else ""
    if image.format == "TIFF":
        bits = int(np.max(image.tag_v2.get(258, 8)))
        return bits == 16, bits if 8 < bits < 16 else None
    if image.mode == "I" and isinstance(arguments, tuple) and arguments[1] != 65535:  # PPM
        return False, 16  # Pillow scales other maxima to 16 bits
    is_deep = image.mode[0] == "I" or str(arguments).endswith(";16B")
    return is_deep or arguments == ("RGB", 65535), None


def _colours16(file: Any, image: Any) -> NDArray[np.uint16]:
    # Of each value, Pillow keeps the high byte; the low one, if it expects the other byte order.
    high = np.asarray(_upright(image)).astype(np.uint16)
    file.seek(0)
    low: Any = Image.open(file, formats=[image.format])
    for place, tile in enumerate(low.tile):
        raw, *others = [tile.args] if isinstance(tile.args, str) else tile.args
        mode, _, order = raw.partition(";16")
        if tile.codec_name == "ppm":
            return np.frombuffer(file.read(), ">u2", high.size).reshape(high.shape)
        if mode not in ("RGB", "RGBA", "RGBX", "LA") or not order:
            raise ValueError("16-bit colours of a rare kind")
        swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[order]
        raw = "RGBA" if mode == "LA" else f"{mode};16{swapped}"  # of LA, all four bytes
        low.tile[place] = tile._replace(args=(raw, *others) if others else raw)
    lows = np.asarray(_upright(low))
    return high[..., :3] * 256 + (lows[..., [1, 1, 1]] if mode == "LA" else lows[..., :3])


def _drawn(pixels: Any, values: NDArray[np.float32], threshold: float | None) -> NDArray[np.uint8]:
    if threshold is None:
        seen = np.isfinite(values)
        heat = (values[seen] - values[seen].min())[:, None] / (np.ptp(values[seen]) or 1)
        heat = (3 * heat - (0, 1, 2)).clip(0, 1) * 255  # black, red, yellow, white
        pixels[seen] = (pixels[seen] / 2 + heat / 2).round()
        return pixels
    marked = np.pad(values > threshold, 1)
    inner = marked[:-2, 1:-1] & marked[2:, 1:-1] & marked[1:-1, :-2] & marked[1:-1, 2:]
    half = max(1, round(max(values.shape) / 320)) // 2  # of the width of the contour
    border = Image.fromarray(marked[1:-1, 1:-1] & ~inner).convert("L")
    for steps, colour in ((half + max(1, half), (0, 0, 0)), (half, (0, 255, 255))):
        pixels[np.asarray(border.filter(ImageFilter.BoxBlur(steps))) > 0] = colour
    return pixels


def _listed(images: Any) -> tuple[list[Any], bool]:  # a list, and whether there is only one
    kinds = (*PATH, Image.Image, np.ndarray)
    is_single = isinstance(images, (*kinds, bytes, dict)) or not hasattr(images, "__iter__")
    if isinstance(images, PATH) and (path := Path(images).expanduser()).is_dir() and images != "":
        inner = [each for each in path.rglob("*.*") if each.suffix.lower()[1:] in SUFFIXES.split()]
        inner = [p for p in inner if not SYSTEMS_OR_MASKS.search(p.relative_to(path).as_posix())]
        if not inner:
            raise ValueError(f"{path}: there is no image in this folder: correct the path")
        return sorted(inner), False
    if isinstance(images, PATH) and (images == "" or not path.exists()):
        raise FileNotFoundError(f"{images or 'no path'}: there is no such file: correct the path")
    listed = [images] if is_single else list(images)
    for place, image in enumerate(listed):
        shape = getattr(image, "shape", getattr(image, "size", (1, 1)))
        kind, mode = getattr(image, "dtype", np.uint8), getattr(image, "mode", "")
        is_array = kind == np.uint8 and len(shape) in (2, 3) and shape[2:] in ((), (3,))
        if not isinstance(image, kinds) or not is_array or mode[:1] in list("IF") or 0 in shape:
            what = f"{type(image).__name__} {mode or getattr(image, 'dtype', '')} {shape}"
            raise ValueError(f"{what}: give a path, a PIL image of 8 bits, or uint8 (H, W, 3)")
        listed[place] = image.copy() if isinstance(image, np.ndarray) else image  # from a camera
    return listed, is_single


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
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # of any encoding
    try:
        chosen = {n: getattr(options, n) for n in ("alpha", "runtime", "threads", "bit_depth")}
        detector = Detector(Path(__file__).parent, **chosen)
        images = [image for given in options.images for image in _listed(given)[0]]
        if not images and not options.check:
            raise ValueError("no image was given: name images or folders")
        if options.fail_on and not detector.is_calibrated:  # it would never fail
            raise ValueError(f"--fail_on {options.fail_on}: {detector.guarantee()}")
        for file in filter(None, (options.csv, options.json)):  # before images are scored
            if not file.parent.is_dir() or (file.exists() and not file.is_file()):
                raise ValueError(f"{file}: name a file in a folder that exists")
        drawn = options.overlays and options.overlays.resolve()
        if drawn and any(drawn.is_relative_to(Path(given).resolve()) for given in options.images):
            raise ValueError(f"{drawn}: overlays would be scored later: name a folder elsewhere")
        problems = detector.check() if options.check else []
        notes = [f"check: {each}" for each in problems or ["as at the export"] * options.check]
        notes += [*detector.remarks, detector.guarantee()]
        sys.stderr.write("".join(f"{_printable(note)}\n" for note in notes))
        columns, rows = ("path", "decision", "p_value", "score", "error"), []
        for result in detector.stream(images, size=options.batch_size):
            print(repr(result), flush=True)
            rows.append([v if (v := getattr(result, c)) == v else None for c in columns])  # no NaN
            if options.overlays and result.error is None and result.decision != "normal":
                options.overlays.mkdir(parents=True, exist_ok=True)
                name = f"{len(rows):05}_{Path(str(result.path)).stem[:50]}.png"
                result.overlay().save(options.overlays / name)
        table, content = io.StringIO(), [dict(zip(columns, row, strict=True)) for row in rows]
        csv.writer(table, lineterminator="\n").writerows([columns, *rows])
        texts = {options.csv: table.getvalue(), options.json: json.dumps(content, indent=1)}
        for file in filter(None, texts):
            temporary = file.resolve().with_name(f".{file.name}.{os.getpid()}.tmp")
            try:
                temporary.write_text(texts[file], encoding="utf-8", errors="backslashreplace")
                temporary.replace(file.resolve())
            finally:
                temporary.unlink(missing_ok=True)
        is_alarm = options.fail_on and any(row[1] == options.fail_on for row in rows)
        return 1 if problems or any(row[-1] for row in rows) else 3 if is_alarm else 0
    except (OSError, ValueError, BadZipFile, KeyboardInterrupt) as error:
        is_stop = isinstance(error, KeyboardInterrupt)
        print("interrupted" if is_stop else f"error: {_printable(error)}", file=sys.stderr)
        return 130 if is_stop else 2


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
