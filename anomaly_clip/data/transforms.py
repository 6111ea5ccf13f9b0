"""An image's way in: a file of any kind to a square uint8 array, a mask to a bool array.

Resizing is PIL's, which antialiases, as the published code does; OpenCV's bicubic filter does not,
and gives other values.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = [
    "Mask",
    "MaskFilter",
    "Resize",
    "is_image",
    "open_image",
    "read_grey",
    "read_image",
    "read_mask",
    "resize_image",
    "resize_mask",
    "solid",
]

Mask = NDArray[np.bool_] | NDArray[np.uint8]
"""``(H, W)``: bool, or uint8 where a mask's grey values count."""

MaskFilter = Literal["bilinear", "nearest"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

PLAIN_MODES = ("1", "L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""PIL's modes whose zero is black."""

IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"]
)


@dataclass(frozen=True)
class Resize:
    """How a picture becomes square.

    Args:
        rule: square: both sides to the asked size, the aspect ratio is not kept (CLIP-AD, and data
            sets that are not square). square_crop: both sides to ``size``, then the centre (TAB:
            256, lanczos). shorter_crop: the shorter side to ``size``, then the centre.
        size: Side before the crop, in pixels; none for square.
        filter: PIL's filter.
    """

    rule: Literal["square", "square_crop", "shorter_crop"] = "square"
    size: int | None = None
    filter: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"

    def check(self, image_size: int) -> None:
        """Refuse sizes that do not fit.

        Raises:
            ValueError: If a size is missing, useless, or smaller than what is cut out of it.
        """
        if self.rule == "square":
            if self.size is not None:
                raise ValueError(
                    f"data.resize.size {self.size}: rule square cuts nothing out, so set it "
                    f"to null or take square_crop"
                )
        elif self.size is None or self.size < image_size:
            raise ValueError(
                f"data.resize.size {self.size}: rule {self.rule} cuts {image_size} pixels out, so "
                f"give {image_size} or more"
            )

    def scaled(self, factor: float) -> Resize:
        """Return the same rule for a picture ``factor`` times as large."""
        return self if self.size is None else replace(self, size=round(self.size * factor))

    def apply(self, picture: Image.Image, size: int, kind: Image.Resampling) -> Image.Image:
        """Resize a picture to ``size`` x ``size``."""
        if self.rule == "square":
            return picture.resize((size, size), kind)
        assert self.size is not None
        width, height = picture.size
        if self.rule == "square_crop":
            width = height = self.size
        else:
            shorter = min(width, height)
            width, height = (int(self.size * side / shorter) for side in (width, height))
        picture = picture.resize((width, height), kind)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return picture.crop((left, top, left + size, top + size))


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


def resize_image(
    image: NDArray[np.uint8] | Image.Image, size: int, resize: Resize = Resize()
) -> NDArray[np.uint8]:
    """Turn ``(H, W, 3)``, or a PIL picture in RGB, into ``(size, size, 3)``.

    By default the aspect ratio is not kept.
    """
    if isinstance(image, np.ndarray):
        if resize.rule == "square" and image.shape[:2] == (size, size):
            return image
        image = Image.fromarray(image)
    elif resize.rule == "square" and image.size == (size, size):
        return np.asarray(image)
    return np.asarray(resize.apply(image, size, _FILTERS[resize.filter]))


def resize_mask(
    mask: Mask,
    size: int,
    kind: MaskFilter = "bilinear",
    threshold: float = 0.5,
    resize: Resize = Resize(),
) -> NDArray[np.bool_]:
    """Resize a mask ``(H, W)`` to ``(size, size)``: True above a threshold of the filtered value.

    Args:
        mask: True = anomalous; uint8: 255 = anomalous.
        size: Side in pixels.
        kind: PIL's antialiased bilinear filter (published), or the nearest pixel.
        threshold: In [0, 1), of the filtered value.
        resize: How it becomes square, as its image does; the filter is ``kind``.
    """
    values = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
    resized = resize.apply(Image.fromarray(values), size, _FILTERS[kind])
    positive: NDArray[np.bool_] = np.asarray(resized) > threshold * 255
    return positive


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
