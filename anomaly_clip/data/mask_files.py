"""Reading of a mask file by the rule of its data set, fitted to the size of its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anomaly_clip.data.info import MaskRule
from anomaly_clip.images import read_header
from anomaly_clip.masks import Mask, read_grey, read_mask

__all__ = [
    "OWN_MISFIT",
    "OWN_MISFIT_SHARE",
    "fits",
    "load_mask",
    "mismatch",
    "read_fitted_mask",
    "upright_size",
]

OWN_MISFIT = 2
"""Largest difference in size, in pixels, of a user's own masks from their images. Our choice: what
rounding half a size or cropping a border leaves; a larger one is another image."""
OWN_MISFIT_SHARE = 0.02
"""The same as a fraction of the image's side, so that no pixel moves far in a small image."""
NEAREST = "by the nearest pixel"


def load_mask(file: Path, rule: MaskRule) -> Mask:
    """Decode a mask ``(H, W)`` of any size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded completely.
    """
    if rule.grey:
        return read_grey(file, rule.max_pixels)
    return read_mask(file, rule.level, rule.max_pixels)


def read_fitted_mask(file: Path, image: Path, size: tuple[int, int], rule: MaskRule) -> Mask:
    """Decode a mask and resize it to its image by nearest neighbour, if the rule allows this.

    Args:
        file: The mask.
        image: The image, for messages.
        size: Width and height of the image, the right way up.
        rule: Rule for reading the mask.

    Returns:
        The mask ``(H, W)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be decoded, or the sizes differ by more than the rule allows.
    """
    mask = load_mask(file, rule)
    mask_size = (mask.shape[1], mask.shape[0])
    if mask_size == size:
        return mask
    if not fits(mask_size, size, rule):
        raise ValueError(f"{file}: {mismatch(mask_size, image, size)}")
    rows = (np.arange(size[1]) + 0.5) * mask.shape[0] / size[1]
    columns = (np.arange(size[0]) + 0.5) * mask.shape[1] / size[0]
    return mask[rows.astype(int)[:, None], columns.astype(int)]


def fits(mask_size: tuple[int, int], image_size: tuple[int, int], rule: MaskRule) -> bool:
    """Return whether a mask may be resized to its image; sizes are width and height."""
    return all(
        abs(ours - theirs) <= min(rule.fitted, rule.fitted_share * theirs)
        for ours, theirs in zip(mask_size, image_size, strict=True)
    )


def mismatch(mask_size: tuple[int, int], image: Path, image_size: tuple[int, int]) -> str:
    """Describe the sizes of a mask and its image, with the likely cause and what to do."""
    sizes = f"the mask is {mask_size[0]} x {mask_size[1]} pixels, but its image {image.name} is "
    sizes += f"{image_size[0]} x {image_size[1]}"
    if mask_size == image_size[::-1]:
        if read_header(image).turned:
            return f"{sizes}, turned by its EXIF orientation: turn the mask in the same way"
        return f"{sizes}, so the mask lies on its side: turn it by 90 degrees"
    for factor in range(2, 17):
        if (mask_size[0] * factor, mask_size[1] * factor) == image_size:
            return f"{sizes}, exactly {factor} times as large: enlarge the mask {NEAREST}"
        if mask_size == (image_size[0] * factor, image_size[1] * factor):
            return f"{sizes}, so the mask is exactly {factor} times as large: reduce it {NEAREST}"
    return f"{sizes}: make the sizes equal"


def upright_size(image: Path) -> tuple[int, int]:
    """Return the width and height of an image, the right way up, without decoding it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an image.
    """
    return read_header(image).size
