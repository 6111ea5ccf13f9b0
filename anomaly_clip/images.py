"""Decoding of image files of any common format to RGB uint8, and of masks to bool."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    "MAX_PIXELS",
    "Mask",
    "evenly_spaced",
    "is_image",
    "open_image",
    "read_grey",
    "read_image",
    "read_mask",
    "solid",
]

MAX_PIXELS = 250_000_000
"""Default of the largest number of pixels of an image."""

Mask = NDArray[np.bool_] | NDArray[np.uint8]
"""``(H, W)``: bool, or uint8 if the grey values of the mask matter."""

PLAIN_MODES = ("1", "L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""PIL modes in which the value zero means black."""

IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"]
)


def is_image(path: Path) -> bool:
    """Return whether a path has the suffix of an image and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image of any common format to RGB ``(H, W, 3)``, uint8, the right way up.

    Grey, palette and CMYK images are converted, transparency is dropped, and the EXIF orientation
    is applied. 16-bit grey is divided by 257, so that white stays white; PIL reduces 16-bit colour
    to the high byte. Our choice: values are scaled by the range of the format and never by the
    range of the image, so that equal values mean equal brightness in all images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    return np.asarray(open_image(path))


def open_image(path: Path) -> Image.Image:
    """Decode an image like :func:`read_image`, to a PIL image in RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    image = _open(path)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{path}: values of mode {image.mode} have no defined range: save the image with "
                "8 or 16 bits"
            )
        grey8 = (grey.astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey8.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Decode a mask to bool ``(H, W)``: True where any channel is above zero.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    image = _open(path)
    # In RGB, neither opaque alpha nor the inks of CMYK are mistaken for a defect.
    if image.mode not in PLAIN_MODES:
        image = image.convert("RGB")
    values = np.asarray(image)
    positive: NDArray[np.bool_] = values > 0
    return positive if positive.ndim == 2 else np.logical_or.reduce(positive, axis=2)


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Decode a mask to the grey values of its first channel ``(H, W)``, uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    return np.ascontiguousarray(read_image(path)[..., 0])


def solid(mask: Mask) -> NDArray[np.bool_]:
    """Convert a mask to bool; grey values above 127 are True."""
    return mask > 127 if mask.dtype == np.uint8 else mask.astype(np.bool_)


def _open(path: Path) -> Image.Image:
    """Open and decode an image, and apply its EXIF orientation."""
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            image.load()
            with suppress(Exception):  # damaged EXIF data do not make the image unusable
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such file; correct the path, or restore the image"
        ) from None
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise ValueError(
            f"{path}: {'an empty file' if empty else 'not an image in a known format'}; replace or "
            "remove the file"
        ) from None
    except Exception as error:  # decoders raise many kinds for damaged files
        raise ValueError(
            f"{path}: the image cannot be decoded ({error}); replace or remove the file"
        ) from None


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
