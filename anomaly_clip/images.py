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
    "mask_levels",
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

ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
"""PIL modes with an alpha channel."""

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


def read_mask(path: Path, level: int = 0) -> NDArray[np.bool_]:
    """Decode a mask to bool ``(H, W)``: True where any channel is above a grey level.

    A mask that is drawn on a transparent layer is read from its alpha channel; see
    :func:`_drawn_on_transparency`. Values up to 255 are grey levels, whatever the depth of the
    file; larger ones are scaled so that 65535 is 255.

    Args:
        path: The mask.
        level: The grey level, 0 to 254; at 0, every value above zero counts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    return mask_levels(path) > level


def mask_levels(path: Path) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Decode a mask to grey levels ``(H, W)``, the largest of its channels.

    Returns:
        uint8, or float32 in 0 to 255 for files of more than 8 bits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    image = _open(path)
    if image.mode in ALPHA_MODES or (image.mode == "P" and "transparency" in image.info):
        return _drawn_on_transparency(np.asarray(image.convert("RGBA")))
    # In RGB, neither opaque alpha nor the inks of CMYK are mistaken for a defect.
    if image.mode not in PLAIN_MODES:
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values if values.ndim == 2 else _brightest(values)
    top = float(values.max(initial=0, where=np.isfinite(values)))
    fractions = image.mode == "F" and top <= 1
    scale = 255.0 if fractions else 1.0 if top <= 255 else 1 / 257 if top <= 65535 else 255 / top
    return (values * scale).astype(np.float32)


def _drawn_on_transparency(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the grey levels ``(H, W)`` of an RGBA mask ``(H, W, 4)``.

    If some pixels are transparent and all others have one colour, that colour marks the defect
    whatever it is, black included, and alpha is the mask. If the others have several colours, the
    transparent pixels are normal. Without transparent pixels, alpha is ignored.
    """
    colour, alpha = pixels[..., :3], pixels[..., 3]
    grey = _brightest(colour)
    flat = bool((colour == colour[:1, :1]).all())
    visible = alpha > 0
    if flat and alpha.min(initial=255) < alpha.max(initial=0):
        return alpha
    if visible.all() or not (flat or visible.any()):
        return grey
    shown = colour[visible]  # (n, 3)
    if (shown == shown[:1]).all():
        return alpha
    return np.where(visible, grey, np.uint8(0))


def _brightest(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the largest channel of ``(H, W, 3)``; faster than a reduction of so short an axis."""
    pair = np.maximum(colour[..., 0], colour[..., 1])
    return np.maximum(pair, colour[..., 2])


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
