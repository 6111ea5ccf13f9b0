"""Samples of a data set: their files, how they are read, and how they become tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from anomaly_clip.data.augment import Augmentation
from anomaly_clip.data.image_cache import ImageCache
from anomaly_clip.data.info import MaskRule, Split
from anomaly_clip.data.mask_files import read_fitted_mask
from anomaly_clip.data.stitching import Stitching, stitched
from anomaly_clip.data.transforms import MaskFilter, Resize, resize_image, resize_mask
from anomaly_clip.images import ReadRule, open_image
from anomaly_clip.masks import Mask
from anomaly_clip.records import Draw

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # in typing since Python 3.11

__all__ = [
    "Features",
    "Item",
    "Reader",
    "Sample",
    "SampleDataset",
    "Split",
    "open_sample",
    "read_sample",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set's listing.

    Args:
        image: Path of the image.
        category: The image's category.
        label: Whether the image is anomalous.
        mask: Path of the mask; None in data sets without pixel labels, and for most normal images
            (a normal image's mask is not read).
        defect: The kind of defect; ``good`` if there is none.
        target: Whether each class applies to the image; None in data sets without classes.
    """

    image: Path
    category: str
    label: bool
    mask: Path | None = None
    defect: str = "good"
    target: tuple[bool, ...] | None = None


Reader = Callable[[Sample], tuple[NDArray[np.uint8], Mask | None]]
"""A function that returns a sample's image ``(H, W, 3)`` and mask ``(H, W)`` before resizing."""


class Features(Protocol):
    """Features of the rows of a data set, as an encoder returns them."""

    def load(self, row: int) -> dict[str, Tensor] | None:
        """Return the features of a row, and ``mask`` if it has one; None if they are lost."""


@dataclass(frozen=True)
class FeatureTable:
    """Features of a data set's rows, held in memory and sent to the data loader workers.

    Args:
        table: Features by name, ``(n, ...)`` each.
    """

    table: dict[str, Tensor]

    def load(self, row: int) -> dict[str, Tensor]:
        """Return the features of a row."""
        return {name: values[row] for name, values in self.table.items()}


class Item(TypedDict):
    """One row of a :class:`~anomaly_clip.records.Batch`, before batching."""

    image: NotRequired[Tensor]
    features: NotRequired[dict[str, Tensor]]
    synthetic: NotRequired[Tensor]
    synthetic_mask: NotRequired[Tensor]
    defect: NotRequired[str]
    label: bool
    category: str
    path: str
    index: int
    mask: NotRequired[Tensor]
    target: NotRequired[Tensor]


def read_sample(
    sample: Sample, rule: MaskRule = MaskRule(), reading: ReadRule = ReadRule()
) -> tuple[NDArray[np.uint8], Mask | None]:
    """Return a sample's image and mask at the image's original size.

    Args:
        sample: The sample to read.
        rule: Rule for reading the mask.
        reading: Settings of decoding.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be decoded, or image and mask differ in size by more than the
            rule allows.
    """
    image, mask = open_sample(sample, rule, reading)
    return np.asarray(image), mask


def open_sample(
    sample: Sample, rule: MaskRule = MaskRule(), reading: ReadRule = ReadRule()
) -> tuple[Image.Image, Mask | None]:
    """Read a sample like :func:`read_sample`, but return a PIL image, which saves two copies."""
    image = open_image(sample.image, reading)
    if sample.mask is None or not sample.label:
        return image, None
    try:
        return image, read_fitted_mask(sample.mask, sample.image, image.size, rule)
    except (OSError, ValueError):
        if rule.lenient:
            return image, None
        raise


class SampleDataset(Dataset[Item]):
    """Samples as tensors.

    Args:
        samples: The listing; a sample's index is its row in the listing.
        image_size: Side of the square images, in pixels.
        mask_size: Side of the square masks, in pixels.
        has_masks: Whether the data set has pixel labels; normal images then get empty masks.
        guard: Returns the context in which a sample is read; default: one without effect.
        mask_filter: Filter that resizes masks.
        mask_threshold: A pixel of a resized mask is True if its value (0 to 1) is above this
            threshold.
        mask_rule: Rule for reading mask files.
        reading: Settings of decoding.
        read: Function that returns a sample's image and mask before resizing; default: read the
            files.
        resize: How an image is made square.
        cache: Cache of resized images and masks; default: none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        mask_size: int,
        *,
        has_masks: bool = True,
        guard: Callable[[Sample], AbstractContextManager[object]] = nullcontext,
        mask_filter: MaskFilter = "bilinear",
        mask_threshold: float = 0.5,
        mask_rule: MaskRule = MaskRule(),
        reading: ReadRule = ReadRule(),
        read: Reader | None = None,
        resize: Resize = Resize(),
        cache: ImageCache | None = None,
    ) -> None:
        resize.check(image_size)
        self.samples = samples
        self.image_size = image_size
        self.mask_size = mask_size
        self.has_masks = has_masks
        self.guard = guard
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.mask_rule = mask_rule
        self.reading = reading
        self.read = read
        self.resize = resize
        self.cache = cache
        self.augmentation: Augmentation | None = None
        """Random transforms of images and masks, if any; for training only."""
        self.stitching: Stitching | None = None
        """Random replacement of images by several of them, if any; for training only."""
        self.features: Features | None = None
        """Features that items contain instead of images, if any."""

    def hold_features(self, table: dict[str, Tensor]) -> None:
        """Hold features in memory; from now on, items contain them instead of images.

        Args:
            table: Features by name, ``(n, ...)`` each, one row per sample.
        """
        self.features = FeatureTable(table)

    @property
    def changes(self) -> bool:
        """True if the images of each epoch differ."""
        return self.augmentation is not None or self.stitching is not None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | Draw) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Draw]) -> list[Item]:
        """Return the rows of a batch: all with features, or all with images if any are lost."""
        rows = [index.index if isinstance(index, Draw) else index for index in indices]
        features = [None if self.features is None else self.features.load(row) for row in rows]
        if None in features:
            features = [None] * len(rows)
        return [self._item(*pair) for pair in zip(indices, features, strict=True)]

    def _item(self, index: int | Draw, features: dict[str, Tensor] | None) -> Item:
        epoch, row = index if isinstance(index, Draw) else (0, index)
        sample = self.samples[row]
        item = Item(label=sample.label, category=sample.category, path=str(sample.image), index=row)
        if features is not None:
            item["features"] = features
            if "mask" in features:
                item["mask"] = features.pop("mask")
        else:
            rows = None if self.stitching is None else self.stitching.drawn(epoch, row)
            if rows is not None:
                image, mask = self.square(*stitched([self._read(other) for other in rows]))
                item["label"] = any(self.samples[other].label for other in rows)
            else:
                with self.guard(sample):
                    cached = self.cache is not None
                    image, mask = self.cached(sample) if cached else self.resized(sample)
            if self.augmentation is not None:
                image, mask = self.augmentation(image, mask, epoch, row)
            item["image"] = torch.from_numpy(image).permute(2, 0, 1).contiguous()
            if self.has_masks and mask is None and not (sample.label and self.mask_rule.lenient):
                mask = np.zeros((self.mask_size, self.mask_size), dtype=bool)
            if self.has_masks and mask is not None:
                item["mask"] = torch.from_numpy(mask)
        if sample.target is not None:
            item["target"] = torch.tensor(sample.target)
        return item

    def resized(self, sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Read a sample; return its image ``(S, S, 3)`` and mask ``(s, s)``, both writable."""
        return self.square(*self._open(sample))

    def _read(self, row: int) -> tuple[NDArray[np.uint8] | Image.Image, Mask | None]:
        with self.guard(self.samples[row]):
            return self._open(self.samples[row])

    def _open(self, sample: Sample) -> tuple[NDArray[np.uint8] | Image.Image, Mask | None]:
        if self.read is None:
            source = sample if self.has_masks else replace(sample, mask=None)
            return open_sample(source, self.mask_rule, self.reading)
        return self.read(sample)

    def square(
        self, image: NDArray[np.uint8] | Image.Image, mask: Mask | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return an image ``(S, S, 3)`` and its mask ``(s, s)``, both writable.

        Args:
            image: The image before it is made square.
            mask: Its mask, if any.
        """
        small = resize_image(image, self.image_size, self.resize)
        # Copied because decoded arrays are read-only, and torch needs memory of its own to collate.
        writable = small if small.flags.writeable else small.copy()
        if mask is None or not self.has_masks:
            return writable, None
        resize = self.resize.scaled(self.mask_size / self.image_size)
        square = resize_mask(mask, self.mask_size, self.mask_filter, self.mask_threshold, resize)
        return writable, square

    def cached(self, sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the result of :meth:`resized`, from the cache if possible."""
        assert self.cache is not None
        cache, image_key = self.cache, f"image {self.image_size} {self.resize}"
        if self.reading.bit_depth != 16:
            image_key += f" {self.reading.bit_depth} bits"
        mask_rule = f"{self.mask_filter} {self.mask_threshold} {self.resize}"
        mask_key = f"mask {self.mask_size} of {self.image_size} {mask_rule}"
        mask_file = sample.mask if self.has_masks and sample.label else None
        square = (self.image_size, self.image_size, 3)
        cached_image = cache.load((sample.image,), image_key, square)
        # A cached mask is only valid for its own image: their sizes were compared on reading.
        pair = () if mask_file is None else (mask_file, sample.image)
        square_mask = (self.mask_size, self.mask_size)
        cached_mask = cache.load(pair, mask_key, square_mask) if pair else None
        if cached_image is not None and (not pair or cached_mask is not None):
            return cached_image, None if cached_mask is None else cached_mask.astype(bool)
        image, mask = self.resized(sample)
        cache.store((sample.image,), image_key, image)
        if pair and mask is not None:
            cache.store(pair, mask_key, mask)
        return image, mask
