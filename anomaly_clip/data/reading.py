"""Reading of a data set's images: bit depth, largest size, images that cannot be decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from anomaly_clip.errors import check_at_least, check_choice

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["BitDepth", "ImageReading", "Unreadable"]

BitDepth = Literal["auto"] | int
Unreadable = Literal["error", "skip"]


class ImageReading:
    """Settings with which a data module reads its images.

    Args:
        data: The data module.
        bit_depth: Significant bits of images with 16 bits per channel, or auto.
        max_pixels: Largest number of pixels of an image.
        unreadable: What fit and test do with images that cannot be decoded.
    """

    def __init__(
        self, data: AnomalyData, bit_depth: BitDepth, max_pixels: int, unreadable: Unreadable
    ) -> None:
        if bit_depth != "auto" and bit_depth not in range(8, 17):
            raise ValueError(f"data.bit_depth must be auto, or from 8 to 16, got {bit_depth}")
        check_at_least("data.max_pixels", max_pixels, 1)
        check_choice("data.unreadable", unreadable, ("error", "skip"))
        self.data = data
        self.bit_depth = bit_depth
        self.max_pixels = max_pixels
        self.unreadable = unreadable
