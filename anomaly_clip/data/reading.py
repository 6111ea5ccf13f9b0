"""Reading of a data set's images: their bit depth, largest size, frames, and distortion.

Cameras with 10, 12 or 14 bits save images with 16 bits per channel, in which the highest values do
not occur. The number of significant bits is chosen once, from all images of a fit, and kept in the
checkpoint; every image is then scaled by the same range.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anomaly_clip.data.distortion import distortion
from anomaly_clip.data.samples import Sample
from anomaly_clip.errors import check_at_least, check_choice
from anomaly_clip.images import ImageHeader, ReadRule, highest_value, read_header
from anomaly_clip.progress import number_of, track

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["BitDepth", "ImageReading", "Unreadable", "chosen_depth", "read_headers"]

BitDepth = Literal["auto"] | int
Unreadable = Literal["error", "skip"]

CAMERA_BITS = (8, 10, 12, 14, 16)
"""Bit depths of cameras; data.bit_depth auto chooses the smallest one that fits."""


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
        self.bits_in_use: int | None = None
        """Significant bits of the images that have 16 bits; None if there are no such images."""
        self.geometry: str | None = None
        """Share of the images that is seen, and their distortion; None if they are untouched."""
        self.frames: str | None = None
        """Remark on files with several frames or pages."""
        self.remarks: list[str] = []
        """Remarks on the images, for the start line."""

    @property
    def rule(self) -> ReadRule:
        """The settings of decoding."""
        fixed = 16 if self.bit_depth == "auto" else self.bit_depth
        return ReadRule(self.bits_in_use or fixed, self.max_pixels)

    def prepare_stage(self, stage: str, stored: int | None) -> None:
        """Prepare the images of a stage; see :meth:`prepare`.

        Args:
            stage: The verb.
            stored: The bit depth with which the model was fitted, if it was.
        """
        data = self.data
        if stage == "fit" and data.auxiliary is not None:
            data.auxiliary.reading.prepare(data.fit_samples())
            if data.validation.is_test:
                self.prepare(data.samples("test"))
            return
        samples = data.fit_samples() if stage == "fit" else data.samples("test")
        if stage == "fit":  # images to calibrate on are read at the same bit depth
            samples = [*samples, *data.calibration.held()]
        if stage != "fit" and data.has_shots:
            samples = [*samples, *(s for name in data.categories for s in data.shots_of(name))]
        self.prepare(samples, stored)

    def prepare(
        self,
        samples: Sequence[Sample],
        stored: int | None = None,
        fitted: Sequence[Sample] | None = None,
    ) -> None:
        """Read the headers of all images, choose the bit depth, and note what the user should know.

        Args:
            samples: The images of a fit or a test.
            stored: The bit depth with which the model was fitted, if it was.
            fitted: The images that the bit depth is chosen from; default: all.

        Raises:
            ValueError: If the bit depth is not that of the fit.
        """
        self.bits_in_use, self.geometry, self.frames, self.remarks = None, None, None, []
        if not self.data.on_disk:
            return
        if stored is not None and self.bit_depth not in ("auto", stored):
            raise ValueError(
                f"data.bit_depth {self.bit_depth} differs from that of the fit ({stored}): leave "
                f"data.bit_depth out, or fit again"
            )
        headers = read_headers([sample.image for sample in samples])
        deep = [path for path, header in headers.items() if header.deep]
        if fitted is not None:
            chosen_from = {sample.image for sample in fitted}
            deep = [path for path in deep if path in chosen_from] or deep
        if deep:
            self._choose_bits(deep, stored)
        framed = [path for path, header in headers.items() if header.frames > 1]
        if framed:
            self.frames = (
                f"of {number_of(len(framed), 'file')} with several frames or pages, such as "
                f"{framed[0].name}, only the first one is read"
            )
            self.remarks.append(self.frames)
        sizes = [header.size for header in headers.values()]
        if sizes and self.data.image_size is not None:
            self.geometry = distortion(sizes, self.data.resize, self.data.image_size)
            self.remarks += [] if self.geometry is None else [self.geometry]

    def _choose_bits(self, deep: Sequence[Path], stored: int | None) -> None:
        images = number_of(len(deep), "image")
        if stored is not None:
            self.bits_in_use, source = stored, "as in the fit"
        elif self.bit_depth != "auto":
            self.bits_in_use, source = self.bit_depth, "data.bit_depth"
        else:
            chosen = chosen_depth(deep)
            if chosen is None:  # none can be decoded, which is reported when they are read
                return
            self.bits_in_use, reason = chosen
            source = f"{reason}; --data.bit_depth {self.bits_in_use} fixes it"
        self.remarks.append(
            f"{images} with 16 bits per channel: {self.bits_in_use} are used ({source})"
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return what an image goes through before it is scored, as plain values.

        A checkpoint stores them, besides the bit depth, so that it can be used without its data.
        """
        data = self.data
        return {
            "data": data.dataset_name,
            "image_size": data.image_size,
            "resize": asdict(data.resize),
            "max_pixels": self.max_pixels,
            "words": {name: data.words(name) for name in data.categories},
            "is_named": not data.has_default_name,
        }

    def protocol(self) -> dict[str, object]:
        """Return how the images were read, to record with the metrics; empty if nothing matters."""
        records = {"bit_depth": self.bits_in_use, "geometry": self.geometry}
        return {name: value for name, value in records.items() if value is not None}


def chosen_depth(deep: Sequence[Path]) -> tuple[int, str] | None:
    """Choose the bit depth of a camera by the highest value in its images, and give the reason.

    Args:
        deep: Images with 16 bits per channel.

    Returns:
        The bit depth, and the reason in words; None if no image can be decoded.
    """
    values = _highest_values(deep)
    if not values:
        return None
    path, highest = max(values.items(), key=lambda item: item[1])
    bits = next(bits for bits in CAMERA_BITS if highest < 2**bits)
    return bits, f"chosen by the highest value, {highest} in {path.name}"


def read_headers(paths: Sequence[Path]) -> dict[Path, ImageHeader]:
    """Return the headers of the images that have one; others are reported when they are decoded."""

    def header_of(path: Path) -> ImageHeader | None:
        try:
            return read_header(path)
        except (OSError, ValueError):
            return None

    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        headers = track(pool.map(header_of, paths), "reading headers", total=len(paths))
        return {p: h for p, h in zip(paths, headers, strict=True) if h is not None}


def _highest_values(paths: Sequence[Path]) -> dict[Path, int]:
    """Return the highest value of each image with 16 bits per channel that can be decoded."""

    def value_of(path: Path) -> int | None:
        try:
            return highest_value(path)
        except (OSError, ValueError):
            return None

    with ThreadPoolExecutor() as pool:
        values = track(pool.map(value_of, paths), "finding the bit depth", total=len(paths))
        return {p: v for p, v in zip(paths, values, strict=True) if v is not None}
