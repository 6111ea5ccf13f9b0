"""An image's way in: a file of any kind to a square uint8 array, a mask to a bool array.

Resizing is PIL's, which antialiases, as the published code does; OpenCV's bicubic filter does not,
and gives other values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["MaskFilter", "is_image", "read_image", "read_mask", "resize_image", "resize_mask"]

MaskFilter = Literal["bilinear", "nearest"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


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
    return _rgb_array(_open(path), path)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Decode a mask to bool ``(H, W)``: True where any channel is above zero.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded, whole.
    """
    picture = _open(path)
    if picture.mode in ("RGBA", "LA", "PA"):
        picture = picture.convert("RGB")  # an opaque alpha channel is no defect
    values = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    positive: NDArray[np.bool_] = values > 0
    return positive if positive.ndim == 2 else np.logical_or.reduce(positive, axis=2)


def resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize ``(H, W, 3)`` to ``(size, size, 3)``, bicubic; the aspect ratio is not kept."""
    if image.shape[:2] == (size, size):
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def resize_mask(
    mask: NDArray[np.bool_], size: int, kind: MaskFilter = "bilinear", threshold: float = 0.5
) -> NDArray[np.bool_]:
    """Resize a mask ``(H, W)`` to ``(size, size)``: True above a threshold of the filtered value.

    Args:
        mask: True = anomalous.
        size: Side in pixels.
        kind: PIL's antialiased bilinear filter (published), or the nearest pixel.
        threshold: In [0, 1), of the filtered value.
    """
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    resized = np.asarray(grey.resize((size, size), _FILTERS[kind]))
    return resized > threshold * 255


def _open(path: Path) -> Image.Image:
    """Open and decode a picture, turned as its EXIF data say."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise ValueError(
            f"{path}: {'an empty file' if empty else 'not an image in a known format'}"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: the image cannot be decoded ({error})") from None


def _rgb_array(picture: Image.Image, path: Path) -> NDArray[np.uint8]:
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = np.asarray(picture)
        if picture.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{path}: values of mode {picture.mode} have no known range; save it with 8 or 16 "
                "bits"
            )
        grey8 = (grey.astype(np.uint32) + 128) // 257
        return np.repeat(grey8.astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(picture.convert("RGB"))
