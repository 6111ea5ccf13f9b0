"""Decoding of photographs and masks: a file of any common kind to RGB uint8, a mask to bool."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    "Mask",
    "evenly_spaced",
    "is_image",
    "open_image",
    "read_grey",
    "read_image",
    "read_mask",
    "solid",
]

Mask = NDArray[np.bool_] | NDArray[np.uint8]
"""``(H, W)``: bool, or uint8 where a mask's grey values count."""

PLAIN_MODES = ("1", "L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""PIL's modes whose zero is black."""

IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"]
)


def is_image(path: Path) -> bool:
    """Whether a name looks like a picture; hidden files never do."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode a picture of any common kind to RGB ``(H, W, 3)``, uint8, the right way up.

    Grey, palette and CMYK pictures are converted, transparency is dropped, EXIF orientation is
    applied. 16-bit grey is divided by 257, so that white stays white; of 16-bit colour PIL takes
    the high byte (our choice: the range is the format's, never the picture's own, so that
    brightness means the same in every picture).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, whole.
    """
    return np.asarray(open_image(path))


def open_image(path: Path) -> Image.Image:
    """Decode a picture as :func:`read_image` does, to a PIL picture in RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, whole.
    """
    picture = _open(path)
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.asarray(picture)
        if picture.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{path}: values of mode {picture.mode} have no known range; save it with 8 or 16 "
                "bits"
            )
        grey8 = (grey.astype(np.uint32) + 128) // 257
        picture = Image.fromarray(grey8.astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Decode a mask to bool ``(H, W)``: True where any channel is above zero.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, whole.
    """
    picture = _open(path)
    if picture.mode not in PLAIN_MODES:  # an opaque alpha channel is no defect, nor is cyan
        picture = picture.convert("RGB")
    values = np.asarray(picture)
    positive: NDArray[np.bool_] = values > 0
    return positive if positive.ndim == 2 else np.logical_or.reduce(positive, axis=2)


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Decode a mask to its first channel ``(H, W)``, uint8, with its grey values.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, whole.
    """
    return np.ascontiguousarray(read_image(path)[..., 0])


def solid(mask: Mask) -> NDArray[np.bool_]:
    """Return a mask as bool; of grey values those above half."""
    return mask > 127 if mask.dtype == np.uint8 else mask.astype(np.bool_)


def _open(path: Path) -> Image.Image:
    """Open and decode a picture, turned as its EXIF data say."""
    try:
        with path.open("rb") as file:
            picture = Image.open(file)
            picture.load()
            with suppress(Exception):  # damaged EXIF data say nothing of the picture
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise ValueError(
            f"{path}: {'an empty file' if empty else 'not an image in a known format'}"
        ) from None
    except Exception as error:  # decoders of damaged files raise of all kinds
        raise ValueError(f"{path}: the image cannot be decoded ({error})") from None


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return the places of ``count`` images spread evenly over a listing of ``total``.

    The first and the last are among them; of fewer than ``count`` images all are.

    Example:
        >>> from anomaly_clip.images import evenly_spaced
        >>> evenly_spaced(3, 9), evenly_spaced(5, 2)
        ([0, 4, 8], [0, 1])
    """
    places = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    return [int(place) for place in places]
