"""Errors in reading samples: unreadable files told from all others, and described by predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from anomaly_clip.data.samples import Item, Reader, Sample, SampleDataset
from anomaly_clip.records import Batch, UnreadableImage

__all__ = [
    "PredictionImages",
    "ReadingGuard",
    "UnreadableError",
    "UnreadableImage",
    "described",
    "files_of",
    "reason_of",
]


class UnreadableError(ValueError):
    """An image or a mask that cannot be decoded.

    Args:
        reason: The file, and why it cannot be decoded.
        advice: Another way out, appended to the message.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}{advice}")
        self.reason = reason

    def described(self, index: int, sample: Sample) -> UnreadableImage:
        """Return a description of the sample that cannot be read."""
        return described(index, sample, self.reason)


@dataclass(frozen=True)
class ReadingGuard:
    """Context in which a sample is read; it tells unreadable files from all other errors.

    Args:
        read: Function that reads a sample; None leaves all errors as they are.
        advice: Another way out, appended to the message of the error.
    """

    read: Reader | None
    advice: str = ""

    @contextmanager
    def __call__(self, sample: Sample) -> Iterator[None]:
        """Convert the error of an image or a mask that cannot be decoded.

        Raises:
            UnreadableError: If a file of the sample cannot be decoded; other errors, such as a mask
                whose size differs from its image's, remain what they are.
        """
        try:
            yield
        except (OSError, ValueError):
            reason = None if self.read is None else reason_of(sample, self.read)
            if reason is None:
                raise
            raise UnreadableError(reason, self.advice) from None


def reason_of(sample: Sample, read: Reader) -> str | None:
    """Return why the image or the mask of a sample cannot be decoded; None if both can be.

    Args:
        sample: The sample. The mask of a normal image is not read.
        read: Function that reads a sample, and raises an ``OSError`` or a ``ValueError``.
    """
    try:
        read(sample)
    except (OSError, ValueError):
        for file in files_of(sample):
            try:
                read(Sample(file, sample.category, label=False))
            except (OSError, ValueError) as error:
                return " ".join(str(error).split())
    return None


def files_of(sample: Sample) -> tuple[Path, ...]:
    """Return the files of a sample that are read."""
    if sample.mask is None or not sample.label:
        return (sample.image,)
    return sample.image, sample.mask


def described(index: int, sample: Sample, reason: str) -> UnreadableImage:
    """Describe an image whose path is not repeated in the reason; the path of a mask stays."""
    short = reason.removeprefix(f"{sample.image}: ")
    return UnreadableImage(index, str(sample.image), sample.category, short)


class PredictionImages(Dataset["Item | UnreadableImage"]):
    """Images to score; in place of an image that cannot be read, the item is a description of it.

    Args:
        images: The images.
    """

    def __init__(self, images: SampleDataset) -> None:
        self.images = images
        images.has_masks = False  # scores need no masks, so none is read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item | UnreadableImage:
        try:
            return self.images[index]
        except UnreadableError as error:
            return error.described(index, self.images.samples[index])

    def collate(self, items: Sequence[Item | UnreadableImage]) -> Batch:
        """Return a batch of the images that could be read, and a list of the others, if any."""
        unreadable = [item for item in items if isinstance(item, UnreadableImage)]
        readable = [item for item in items if not isinstance(item, UnreadableImage)]
        batch: Any = default_collate(readable) if readable else self._empty()
        if unreadable:
            batch["unreadable"] = unreadable
        return batch

    def _empty(self) -> dict[str, Any]:
        """Return a batch without images."""
        side = self.images.image_size
        return {
            "image": torch.zeros(0, 3, side, side, dtype=torch.uint8),
            "label": torch.zeros(0, dtype=torch.bool),
            "category": [],
            "path": [],
            "index": torch.zeros(0, dtype=torch.int64),
        }
