"""Resizing: an image to a square uint8 array, its mask to a square bool array.

Resizing is PIL's, which antialiases, as the published code does; OpenCV's bicubic filter does not,
and gives other values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.images import Mask

__all__ = ["MaskFilter", "Resize", "resize_image", "resize_mask"]

MaskFilter = Literal["bilinear", "nearest"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


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
                    f"data.resize.size {self.size}: rule square cuts nothing out, so give "
                    f"--data.resize '{{rule: square, size: null}}', or take square_crop"
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
