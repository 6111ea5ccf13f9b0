"""Resizing of an image to a square uint8 array, and of its mask to a square bool array.

Images are resized by PIL with antialiasing, as in the published code, by the function that exported
detectors use. OpenCV's bicubic filter does not antialias and gives different values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.masks import Mask
from anomaly_clip.runtime.detector import make_square, seen_part

__all__ = ["MaskFilter", "Resize", "resize_image", "resize_mask"]

MaskFilter = Literal["bilinear", "nearest"]


@dataclass(frozen=True)
class Resize:
    """Settings that make an image square.

    Args:
        rule: square: resize both sides to the image size, ignoring the aspect ratio (CLIP-AD, and
            data sets that are not square). square_crop: resize both sides to ``size``, then crop
            the centre (TAB: 256, lanczos). shorter_crop: resize the shorter side to ``size``, then
            crop the centre.
        size: Side before the crop, in pixels; None if the rule is square.
        filter: PIL's filter.
    """

    rule: Literal["square", "square_crop", "shorter_crop"] = "square"
    size: int | None = None
    filter: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"

    def check(self, image_size: int) -> None:
        """Check the size before the crop.

        Raises:
            ValueError: If the size is missing, not applicable, or smaller than the crop.
        """
        if self.rule == "square":
            if self.size is not None:
                raise ValueError(
                    f"data.resize.size {self.size}: rule square does not crop: set --data.resize "
                    f"'{{rule: square, size: null}}', or use rule square_crop"
                )
        elif self.size is None or self.size < image_size:
            raise ValueError(
                f"data.resize.size {self.size}: rule {self.rule} crops {image_size} pixels, so the "
                f"size must be {image_size} or more"
            )

    def scaled(self, factor: float) -> Resize:
        """Return the same rule for an image ``factor`` times as large."""
        return self if self.size is None else replace(self, size=round(self.size * factor))

    def apply(self, image: Image.Image, size: int, kind: Image.Resampling) -> Image.Image:
        """Resize an image to ``size`` x ``size``."""
        return make_square(image, size, self.rule, self.size, kind.name)

    def seen(self, width: int, height: int, size: int) -> tuple[int, int, int, int]:
        """Return the part of an image that is left, in its own pixels.

        Args:
            width: Width of the image.
            height: Height of the image.
            size: Side of the square image.

        Returns:
            Left, top, right and bottom, rounded to pixels and never empty.

        Example:
            >>> from anomaly_clip.data.transforms import Resize
            >>> Resize("shorter_crop", 256).seen(512, 256, 224)
            (144, 16, 368, 240)
        """
        left, top, right, bottom = seen_part(width, height, size, self.rule, self.size)
        return left, top, right, bottom


def resize_image(
    image: NDArray[np.uint8] | Image.Image, size: int, resize: Resize = Resize()
) -> NDArray[np.uint8]:
    """Resize ``(H, W, 3)``, or a PIL image in RGB, to ``(size, size, 3)``.

    The default rule ignores the aspect ratio.
    """
    if isinstance(image, np.ndarray):
        if resize.rule == "square" and image.shape[:2] == (size, size):
            return image
        image = Image.fromarray(image)
    elif resize.rule == "square" and image.size == (size, size):
        return np.asarray(image)
    return np.asarray(resize.apply(image, size, Image.Resampling[resize.filter.upper()]))


def resize_mask(
    mask: Mask,
    size: int,
    kind: MaskFilter = "bilinear",
    threshold: float = 0.5,
    resize: Resize = Resize(),
) -> NDArray[np.bool_]:
    """Resize a mask ``(H, W)`` to ``(size, size)`` and threshold the filtered values.

    Args:
        mask: bool, True = anomalous; or uint8, 255 = anomalous.
        size: Side in pixels.
        kind: PIL's antialiased bilinear filter (as published), or the nearest pixel.
        threshold: Threshold of the filtered values, in [0, 1).
        resize: Settings that made the image square; the mask uses ``kind`` as the filter instead.
    """
    values = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
    resized = resize.apply(Image.fromarray(values), size, Image.Resampling[kind.upper()])
    positive: NDArray[np.bool_] = np.asarray(resized) > threshold * 255
    return positive
