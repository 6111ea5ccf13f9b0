"""An image's way in: decoded picture to square uint8 array, mask to bool array.

Resizing is PIL's, which antialiases, as the published code does; OpenCV's bicubic filter does not,
and gives other values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["MaskFilter", "resize_image", "resize_mask"]

MaskFilter = Literal["bilinear", "nearest"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


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
