"""Decoding of image files of any common format to RGB uint8.

Formats are recognised by :mod:`~anomaly_clip.image_formats`. PIL decodes all of them, except
colours with 16 bits per channel, which it reduces to 8 bits: OpenCV decodes these.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from anomaly_clip.image_formats import (
    FIRST_BYTES,
    claims_more_than_it_has,
    describe_content,
    format_of,
    is_image,
)

__all__ = [
    "MAX_PIXELS",
    "ImageHeader",
    "ReadRule",
    "decode",
    "evenly_spaced",
    "highest_value",
    "is_image",
    "open_image",
    "pixel_bands",
    "read_header",
    "read_image",
]

MAX_PIXELS = 250_000_000
"""Default of the largest number of pixels of an image."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its exceptions say the same

ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # its values that turn an image by 90 degrees; damaged files have others
WIDTH, HEIGHT, BITS_PER_SAMPLE, PLANAR_CONFIGURATION = 256, 257, 258, 284  # TIFF tags
TEXT_LIMIT = 1 << 28  # bytes of a text in a PNG; PIL's limit of 1 MB is less than some editors save
STDERR = 2  # file descriptor
BAND = 256  # rows that are converted at once, which saves memory


@dataclass(frozen=True)
class ReadRule:
    """Settings of decoding.

    Args:
        bit_depth: Significant bits of images with 16 bits per channel: 8 to 16.
        max_pixels: Largest number of pixels of an image.
    """

    bit_depth: int = 16
    max_pixels: int = MAX_PIXELS


class ImageHeader(NamedTuple):
    """Properties of an image file that are known before its pixels are decoded."""

    size: tuple[int, int]
    """Width and height in pixels, the right way up."""
    turned: bool
    """True if the EXIF orientation turns the image by 90 degrees."""
    deep: bool
    """True if there are 16 bits per channel, of which a camera may use fewer."""
    frames: int
    """Number of frames or pages; only the first one is read."""
    format: str
    """PIL's name of the format, such as PNG."""
    mode: str
    """PIL's mode, such as RGB."""


def read_header(path: Path) -> ImageHeader:
    """Read the properties of an image without decoding it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an image.
    """
    with _decoding(path) as file:
        image = _identify(path, file)
        deep = _is_deep(image)
        size, turned = _stored_size(image), False
        # PIL would decode a PNG to look for EXIF data after the pixels.
        if image.format != "PNG" or "exif" in image.info:
            with suppress(Exception):  # damaged EXIF data do not make the image unusable
                turned = image.getexif().get(ORIENTATION) in TURNED
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        kind = image.format or ""
        return ImageHeader(size[::-1] if turned else size, turned, deep, frames, kind, image.mode)


def highest_value(path: Path) -> int:
    """Return the highest value of an image with 16 bits per channel.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    with _decoding(path) as file:
        return max(int(band.max()) for band in _bands(_identify(path, file), file))


def pixel_bands(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[NDArray[np.integer]]:
    """Yield the decoded pixels of an image, some rows at a time.

    Returns:
        RGB ``(h, W, 3)``, uint8, as :func:`read_image`; but the stored values of an image with 16
        bits per channel, ``(h, W)`` or ``(h, W, 3)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely, or has more than ``max_pixels``.
    """
    with _decoding(path) as file:
        image = _identify(path, file, max_pixels)
        if _is_deep(image):
            yield from _bands(image, file)
            return
    yield from _cropped(open_image(path, ReadRule(max_pixels=max_pixels)))


def read_image(path: Path, rule: ReadRule = ReadRule()) -> NDArray[np.uint8]:
    """Decode an image of any common format to RGB ``(H, W, 3)``, uint8, the right way up.

    Grey, palette and CMYK images are converted, transparency is dropped, and the EXIF orientation
    is applied. Of several frames or pages, the first one is read. Values of 16 bits are scaled so
    that the highest value of ``rule.bit_depth`` bits becomes 255. Our choice: values are scaled by
    the range of the format, or of the camera, and never by the range of the image, so that equal
    values mean equal brightness in all images.

    Args:
        path: The file.
        rule: Settings of decoding.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely, has too many pixels, or has values
            above its bit depth.
    """
    return np.asarray(open_image(path, rule))


def open_image(path: Path, rule: ReadRule = ReadRule()) -> Image.Image:
    """Decode an image like :func:`read_image`, to a PIL image in RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`read_image`.
    """
    image = decode(path, rule)
    if image.mode == "F":
        raise ValueError(
            f"{path}: floating-point values have no defined range: save the image with 8 or 16 bits"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return ``count`` evenly spaced indices into a list of ``total`` items.

    They include the first and the last index. If there are fewer than ``count`` items, the indices
    of all items are returned.

    Example:
        >>> from anomaly_clip.images import evenly_spaced
        >>> evenly_spaced(3, 9), evenly_spaced(5, 2)
        ([0, 4, 8], [0, 1])
    """
    places = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    return [int(place) for place in places]


# -- decoding --------------------------------------------------------------------------------------


class _Unreadable(ValueError):
    """The reason why a file is not read, for a message that begins with its path."""


class _PilLimits:
    """PIL's limits, which are global, lifted while files are decoded; :class:`ReadRule` has ours.

    Several threads may decode at once: the last one restores the limits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._saved: tuple[int | None, int, int] = (None, 0, 0)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if self._threads == 0:
                text = PngImagePlugin
                self._saved = Image.MAX_IMAGE_PIXELS, text.MAX_TEXT_CHUNK, text.MAX_TEXT_MEMORY
                Image.MAX_IMAGE_PIXELS = None
                text.MAX_TEXT_CHUNK, text.MAX_TEXT_MEMORY = TEXT_LIMIT, 4 * TEXT_LIMIT
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0:
                    text = PngImagePlugin
                    Image.MAX_IMAGE_PIXELS, text.MAX_TEXT_CHUNK, text.MAX_TEXT_MEMORY = self._saved


_PIL_LIMITS = _PilLimits()


class _Silence:
    """Standard error without the lines of C libraries, such as libtiff and libpng.

    They write past Python while they decode, and their exceptions say the same. Several threads may
    decode at once: the last one restores the output. Python's own output has another descriptor;
    see :func:`anomaly_clip.cli.main`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._saved: int | None = None

    @contextmanager
    def of_libraries(self) -> Iterator[None]:
        with self._lock:
            if self._threads == 0:
                self._saved = _redirected()
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0 and self._saved is not None:
                    os.dup2(self._saved, STDERR)
                    os.close(self._saved)


def _redirected() -> int | None:
    """Let standard error lead nowhere; return a copy of its descriptor, None if it is closed."""
    try:
        saved = os.dup(STDERR)
    except OSError:
        return None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    os.close(nowhere)
    return saved


_SILENCE = _Silence()


@contextmanager
def _decoding(path: Path) -> Iterator[IO[bytes]]:
    """Open an image file, and explain the exceptions of its decoder."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise _Unreadable("a folder or special file, not an image; rename or remove it")
        with path.open("rb") as file, _PIL_LIMITS.lifted():
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such file; correct the path, or restore the image"
        ) from None
    except _Unreadable as error:
        raise ValueError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{path}: the image cannot be decoded (its header is damaged, or of a kind that PIL "
            f"does not read); replace or remove the file"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged files
        raise ValueError(
            f"{path}: the image cannot be decoded ({error}); replace or remove the file"
        ) from None


def _identify(path: Path, file: IO[bytes], max_pixels: int | None = None) -> ImageFile.ImageFile:
    """Return an image whose header is read, but not its pixels."""
    first_bytes = file.read(FIRST_BYTES)
    file.seek(0)
    kind = format_of(first_bytes, path.suffix.lower())
    if kind is None:
        raise _Unreadable(f"{describe_content(first_bytes)}; replace or remove the file")
    if kind == "HEIF":
        _add_heif()
    image = Image.open(file, formats=[kind])
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise _Unreadable(
            f"{width} x {height} are {width * height / 1e6:.0f} million pixels, more than "
            f"data.max_pixels {max_pixels}: raise it if there are about 12 bytes of memory per "
            f"pixel, or make the image smaller"
        )
    return image


def _add_heif() -> None:
    """Add the decoder of HEIF to PIL, which needs an optional package."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise _Unreadable(
            "a photograph in HEIF, which needs the package pillow-heif: install it, or export the "
            "photograph as JPEG"
        ) from None
    register_heif_opener()


def decode(path: Path, rule: ReadRule, scaled: bool = True) -> Image.Image:
    """Decode an image of any mode, the right way up.

    Args:
        path: The file.
        rule: Settings of decoding.
        scaled: Whether to scale 16 bits to 8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`read_image`.
    """
    with _decoding(path) as file:
        image = _identify(path, file, rule.max_pixels)
        bits = _declared_bits(image) or rule.bit_depth
        if scaled and _is_grey16(image):
            grey = _upright(image)
            return _scaled(grey.size, _cropped(grey), bits, "L")
        if scaled and bits < 16 and _is_deep(image):
            values = _colours16(image, file)
            colours = _scaled(values.shape[1::-1], _rows(values), bits, "RGB")
            if image.format != "TIFF":  # OpenCV itself turns TIFF, and no other format
                colours.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
            return _upright(colours)
        _refuse_planes(image)
        return _upright(image)  # PIL reduces colours of 16 bits to their high byte


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return width and height before the orientation is applied, as some versions of PIL do."""
    width, height = image.size
    if image.format == "TIFF":
        return _tiff_tag(image, WIDTH, width), _tiff_tag(image, HEIGHT, height)
    return width, height


def _upright(image: Image.Image) -> Image.Image:
    """Decode an image and apply its EXIF orientation."""
    with _SILENCE.of_libraries():
        image.load()
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        ImageOps.exif_transpose(image, in_place=True)
    return image


# -- 16 bits per channel ---------------------------------------------------------------------------


def _is_grey16(image: Image.Image) -> bool:
    return image.mode.startswith("I")


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Return whether 16 bits are stored per channel, of which a camera may use fewer."""
    if _declared_bits(image) is not None:
        return False
    if image.format == "TIFF":
        return max(_tiff_tag(image, BITS_PER_SAMPLE, (8,))) == 16
    if _is_grey16(image):
        return True
    arguments = image.tile[0].args if image.tile else ""
    return (isinstance(arguments, str) and arguments.endswith(";16B")) or (
        image.format == "PPM" and arguments == ("RGB", 65535)
    )


def _declared_bits(image: ImageFile.ImageFile) -> int | None:
    """Return the number of bits if the file itself tells that it is between 8 and 16."""
    if image.format == "TIFF":
        bits = max(_tiff_tag(image, BITS_PER_SAMPLE, (8,)))
        return bits if 8 < bits < 16 else None
    if image.format == "PPM" and image.mode == "I" and image.tile:
        arguments = image.tile[0].args  # PIL scales from any declared maximum to 16 bits
        return 16 if isinstance(arguments, tuple) and arguments[1] != 65535 else None
    return None


def _refuse_planes(image: ImageFile.ImageFile) -> None:
    """Refuse 16-bit colours in separate planes, which neither PIL nor OpenCV read correctly."""
    separate = image.format == "TIFF" and _tiff_tag(image, PLANAR_CONFIGURATION, 1) == 2
    if separate and max(_tiff_tag(image, BITS_PER_SAMPLE, (8,))) > 8:
        raise _Unreadable(
            "a TIFF with separate planes of 16 bits, which is not read correctly: save it with "
            "interleaved channels (planar configuration 1), or with 8 bits"
        )


def _tiff_tag(image: ImageFile.ImageFile, tag: int, default: object) -> Any:
    value = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return (value,) if tag == BITS_PER_SAMPLE and isinstance(value, int) else value


def _bands(image: ImageFile.ImageFile, file: IO[bytes]) -> Iterator[NDArray[np.integer]]:
    """Yield the values of a deep image: some rows ``(h, W)`` or ``(h, W, 3)`` at a time."""
    if _is_grey16(image):
        with _SILENCE.of_libraries():
            image.load()
        yield from _cropped(image)
        return
    yield from _rows(_colours16(image, file))


def _colours16(image: ImageFile.ImageFile, file: IO[bytes]) -> NDArray[np.uint16]:
    """Decode colours of 16 bits to RGB ``(H, W, 3)``."""
    _refuse_planes(image)
    file.seek(0)
    content = np.frombuffer(file.read(), np.uint8)
    if image.format == "PNG" and claims_more_than_it_has(content.tobytes()):
        raise _Unreadable(
            "the image cannot be decoded (a part of it is longer than the file); replace or remove "
            "the file"
        )
    log: Any = getattr(cv2.utils, "logging", cv2)  # in OpenCV 5, and in OpenCV 4
    level = log.setLogLevel(0)  # silent; returns the old one
    try:
        with _SILENCE.of_libraries():
            values: Any = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    finally:
        log.setLogLevel(level)
    sides = [] if values is None or values.dtype != np.uint16 else sorted(values.shape[:2])
    if sides != sorted(image.size):
        raise _Unreadable("its 16-bit colours cannot be decoded: save it as PNG, or with 8 bits")
    colours: NDArray[np.uint16] = values[:, :, 2::-1]  # from BGR or BGRA
    return colours


def _rows(values: NDArray[np.uint16]) -> Iterator[NDArray[np.integer]]:
    for top in range(0, len(values), BAND):
        yield values[top : top + BAND]


def _cropped(image: Image.Image) -> Iterator[NDArray[np.integer]]:
    """Yield the values of a decoded image, some rows at a time."""
    width, height = image.size
    for top in range(0, height, BAND):
        band: NDArray[np.integer] = np.asarray(image.crop((0, top, width, min(top + BAND, height))))
        yield band


def _scaled(
    size: tuple[int, int], bands: Iterator[NDArray[np.integer]], bits: int, mode: str
) -> Image.Image:
    """Scale values so that the highest value of ``bits`` bits becomes 255."""
    full = 2**bits - 1
    table = ((np.arange(full + 1, dtype=np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    scaled = Image.new(mode, size)
    top = 0
    for band in bands:
        lowest, highest = int(band.min()), int(band.max())
        if lowest < 0 or highest > 65535:
            raise _Unreadable(
                f"values from {lowest} to {highest} have no defined range: save the image with 8 "
                f"or 16 bits"
            )
        if highest > full:
            needed = highest.bit_length()
            raise _Unreadable(
                f"its values reach {highest}, but {bits} bits end at {full}: set data.bit_depth to "
                f"{needed}{' or more' if needed < 16 else ''}, and fit again if the model was "
                f"fitted with {bits}"
            )
        scaled.paste(Image.fromarray(table[band]), (0, top))
        top += len(band)
    return scaled
