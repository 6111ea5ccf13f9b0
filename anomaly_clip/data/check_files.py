"""Inspection of a data set's files for properties and problems; every file is read completely."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes, hash_of_pixels, pixels_sha256
from anomaly_clip.data.layout import MASK_OF_NORMAL, missing_mask
from anomaly_clip.data.mask_checks import InspectedMask, inspect_mask
from anomaly_clip.data.mask_files import fits, mismatch
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.files import printable
from anomaly_clip.images import ImageHeader, read_header, read_image
from anomaly_clip.progress import track

__all__ = ["InspectedSample", "Problem", "inspect_samples", "printable", "short_path"]

FORMATS = {
    ".png": {"PNG"},
    ".jpg": {"JPEG", "MPO"},
    ".jpeg": {"JPEG", "MPO"},
    ".bmp": {"BMP", "DIB"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
    ".webp": {"WEBP"},
    ".ppm": {"PPM"},
    ".pgm": {"PPM"},
}
"""Permitted formats of each file extension, by PIL's names."""

THUMBNAIL = 16  # side in pixels; near-duplicates are compared at this size


class Problem(NamedTuple):
    """One problem of a data set."""

    kind: str
    path: str
    message: str


class InspectedSample(NamedTuple):
    """Properties of one sample's files."""

    sample: Sample
    split: Split
    digest: str | None = None
    """Hash of the file."""
    pixels: str | None = None
    """Hash of the decoded image."""
    size: tuple[int, int] | None = None
    mode: str | None = None
    thumbnail: NDArray[np.float32] | None = None
    problems: tuple[Problem, ...] = ()
    misfit: int = 0
    """Difference in size between the mask and its image, in pixels."""
    mask: InspectedMask | None = None
    """Properties of the mask; None without a readable one."""


def inspect_samples(
    data: AnomalyData,
    listed: Sequence[tuple[Sample, Split]],
    workers: int | None = None,
    thumbnails: bool = False,
) -> list[InspectedSample]:
    """Read and inspect the files of all samples, several at once.

    Args:
        data: The data set.
        listed: The samples and their splits.
        workers: Number of reading threads; default: one per core.
        thumbnails: Whether to compute thumbnails, for the comparison of near-duplicates.
    """
    hashes = FileHashes()
    hashes.sha256_of_all([])  # loads the stored hashes before the threads start

    def inspect(listed_sample: tuple[Sample, Split]) -> InspectedSample:
        sample, split = listed_sample
        if not data.on_disk:
            return _inspect_image_in_memory(data, sample, split, thumbnails)
        return _SampleInspection(data, sample, hashes).run(split, thumbnails)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            return list(track(pool.map(inspect, listed), "checking", total=len(listed)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _inspect_image_in_memory(
    data: AnomalyData, sample: Sample, split: Split, thumbnails: bool
) -> InspectedSample:
    image, _ = data.reader()(sample)
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    thumbnail = _thumbnail(image) if thumbnails else None
    return InspectedSample(sample, split, digest, digest, _size(image), "RGB", thumbnail)


@dataclass
class _SampleInspection:
    """Inspection of one sample's files, which collects their problems."""

    data: AnomalyData
    sample: Sample
    hashes: FileHashes
    problems: list[Problem] = field(default_factory=list)

    def run(self, split: Split, thumbnails: bool) -> InspectedSample:
        """Inspect the image and the mask."""
        sample = self.sample
        try:
            image = read_image(sample.image, self.data.reading.rule)
            header = read_header(sample.image)
            mode, file_format = header.mode, header.format
            pixels = self._hash_of(image, header)
            digest = self.hashes.sha256(sample.image)
        except FileNotFoundError:
            self._add("missing", sample.image, "there is no such file")
            return InspectedSample(sample, split, problems=tuple(self.problems))
        except Exception as error:  # one bad file must not end the check of the others
            self._add("unreadable", sample.image, str(error))
            return InspectedSample(sample, split, problems=tuple(self.problems))
        if file_format not in FORMATS.get(sample.image.suffix.lower(), {file_format}):
            message = f"the extension does not match the content, a {file_format} file"
            self._add("extension", sample.image, message)
        if header.frames > 1:
            message = (
                f"the file has {header.frames} frames or pages, of which only the first is read"
            )
            self._add("frames", sample.image, message)
        misfit, mask = (0, None) if sample.mask is None else self._inspect_mask(image)
        return InspectedSample(
            sample,
            split,
            digest,
            pixels,
            _size(image),
            mode,
            _thumbnail(image) if thumbnails else None,
            tuple(self.problems),
            misfit,
            mask,
        )

    def _hash_of(self, image: NDArray[np.uint8], header: ImageHeader) -> str:
        """Return the hash of the decoded image, of the stored values if they have 16 bits."""
        if header.deep:
            return pixels_sha256(self.sample.image, self.data.reading.max_pixels)
        return hash_of_pixels(image)

    def _inspect_mask(self, image: NDArray[np.uint8]) -> tuple[int, InspectedMask | None]:
        """Inspect the mask; return its difference in size from the image, and its properties."""
        sample, rule = self.sample, self.data.mask_rule
        assert sample.mask is not None
        try:
            mask = inspect_mask(sample, rule)
        except FileNotFoundError:
            message = missing_mask(sample, self.data.mask_endings, self.data.mask_hint)
            self._add("mask missing", sample.image, message)
            return 0, None
        except Exception as error:  # one bad file must not end the check of the others
            self._add("unreadable", sample.mask, str(error))
            return 0, None
        size = _size(image)
        if not fits(mask.size, size, rule):
            self._add("mask size", sample.mask, mismatch(mask.size, sample.image, size))
        if sample.label and not mask.marked:
            self._add("mask empty", sample.mask, "the mask of an anomalous image is empty")
        if not sample.label and mask.marked:
            self._add("mask of normal", sample.mask, MASK_OF_NORMAL)
        return max(abs(a - b) for a, b in zip(mask.size, size, strict=True)), mask

    def _add(self, kind: str, path: Path, message: str) -> None:
        message = printable(message.removeprefix(f"{path}: "))
        self.problems.append(Problem(kind, short_path(self.data, path), message))


def _size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the width and the height of an image ``(H, W, 3)``."""
    return image.shape[1], image.shape[0]


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return grey values of mean 0 and norm 1; dot products of thumbnails are correlations."""
    grey = resize_image(image, THUMBNAIL).astype(np.float32).mean(axis=2).ravel()
    grey = grey - grey.mean()
    length = float(np.linalg.norm(grey))
    return (grey / length if length > 0 else grey).astype(np.float32)


def short_path(data: AnomalyData, path: Path) -> str:
    """Return a path relative to the data set's folder."""
    try:
        return printable(str(path.relative_to(data.root) if path != data.root else path))
    except ValueError:
        return printable(str(path))
