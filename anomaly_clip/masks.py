"""Decoding of mask files of any common format to bool, or to grey values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.images import MAX_PIXELS, ReadRule, decode, read_image

__all__ = ["Mask", "mask_levels", "read_grey", "read_mask", "solid"]

Mask = NDArray[np.bool_] | NDArray[np.uint8]
"""``(H, W)``: bool, or uint8 if the grey values of the mask matter."""

PLAIN_MODES = ("1", "L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""PIL modes in which the value zero means black."""

ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
"""PIL modes with an alpha channel."""


def read_mask(path: Path, level: int = 0, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """Decode a mask to bool ``(H, W)``: True where any channel is above a grey level.

    A mask that is drawn on a transparent layer is read from its alpha channel; see
    :func:`_drawn_on_transparency`. Values up to 255 are grey levels, whatever the depth of the
    file; larger ones are scaled so that 65535 is 255.

    Args:
        path: The mask.
        level: The grey level, 0 to 254; at 0, every value above zero counts.
        max_pixels: Largest number of pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    return mask_levels(path, max_pixels) > level


def mask_levels(
    path: Path, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Decode a mask to grey levels ``(H, W)``, the largest of its channels.

    Returns:
        uint8, or float32 in 0 to 255 for files of more than 8 bits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely, or has more than ``max_pixels``.
    """
    image = decode(path, ReadRule(max_pixels=max_pixels), scaled=False)
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


def read_grey(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a mask to the grey values of its first channel ``(H, W)``, uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely, or has more than ``max_pixels``.
    """
    return np.ascontiguousarray(read_image(path, ReadRule(max_pixels=max_pixels))[..., 0])


def solid(mask: Mask) -> NDArray[np.bool_]:
    """Convert a mask to bool; grey values above 127 are True."""
    return mask > 127 if mask.dtype == np.uint8 else mask.astype(np.bool_)
