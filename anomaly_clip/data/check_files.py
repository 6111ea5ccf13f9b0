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
from PIL import Image

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.file_hashes import FileHashes, hash_of_pixels
from anomaly_clip.data.samples import read_sample
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.images import read_grey, read_mask, solid
from anomaly_clip.progress import track

__all__ = [
    "MASK_OF_NORMAL",
    "InspectedSample",
    "Problem",
    "inspect_samples",
    "printable",
    "short_path",
]

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

MASK_OF_NORMAL = "the mask of a normal image is not empty"

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
            image, _ = read_sample(Sample(sample.image, sample.category, sample.label))
            with Image.open(sample.image) as opened:
                mode, file_format = opened.mode, opened.format or ""
                frames = int(getattr(opened, "n_frames", 1))  # of formats with several frames
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
        if frames > 1 and file_format != "MPO":  # whose other frames are previews
            message = f"the file has {frames} frames or pages, of which only the first is read"
            self._add("frames", sample.image, message)
        misfit = 0 if sample.mask is None else self._inspect_mask(sample.mask, image)
        return InspectedSample(
            sample,
            split,
            digest,
            hash_of_pixels(image),
            _size(image),
            mode,
            _thumbnail(image) if thumbnails else None,
            tuple(self.problems),
            misfit,
        )

    def _inspect_mask(self, file: Path, image: NDArray[np.uint8]) -> int:
        """Inspect a mask and return the difference in size from its image, in pixels."""
        rule = self.data.info.mask
        try:
            mask = solid(read_grey(file) if rule.grey else read_mask(file))
            with Image.open(file) as opened:
                lossy = opened.format in ("JPEG", "MPO")
        except FileNotFoundError:
            message = f"its mask is missing, expected {file.name}"
            self._add("mask missing", self.sample.image, message)
            return 0
        except Exception as error:  # one bad file must not end the check of the others
            self._add("unreadable", file, str(error))
            return 0
        if lossy:
            message = "the mask is a JPEG, whose noise counts as defective pixels: save it as PNG"
            self._add("mask lossy", file, message)
        misfit = max(abs(a - b) for a, b in zip(mask.shape, image.shape, strict=False))
        if misfit > rule.fitted:
            sizes = f"{mask.shape[1]} x {mask.shape[0]}, its image {image.shape[1]} x "
            self._add("mask size", file, f"the mask is {sizes}{image.shape[0]} pixels")
        if self.sample.label and not mask.any():
            self._add("mask empty", file, "the mask of an anomalous image is empty")
        if not self.sample.label and mask.any():
            self._add("mask of normal", file, MASK_OF_NORMAL)
        return misfit

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


def printable(text: str) -> str:
    """Escape unprintable characters, such as a line break in a file name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
