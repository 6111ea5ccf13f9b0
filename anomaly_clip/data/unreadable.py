"""Images that cannot be read: left out of fit and test on request, and kept by predict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_clip.data.mask_files import load_mask
from anomaly_clip.data.reading_errors import ReadingGuard, described, files_of, reason_of
from anomaly_clip.data.samples import Sample, Split
from anomaly_clip.progress import number_of, track
from anomaly_clip.records import UnreadableImage

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["UnreadableFiles"]

ADVICE = ", or set data.unreadable skip"


class UnreadableFiles:
    """Implementation of ``data.unreadable``, and of predict's way with images that cannot be read.

    Args:
        data: The data module, whose ``reading`` has the option.
    """

    def __init__(self, data: AnomalyData) -> None:
        self.data = data
        self.predicts = False
        """True if the test images are scored without metrics: those that can be read."""
        self.keeps_all = False
        """True if all images are listed, whatever the option is: for preview."""
        self._reasons: dict[tuple[Path, ...], str | None] = {}
        """Why the files of a sample cannot be read; None if they can be."""
        if data.auxiliary is not None and self.skips:
            data.auxiliary.reading.unreadable = "skip"

    @property
    def skips(self) -> bool:
        """True if images that cannot be read are left out of fit and test."""
        return self.data.reading.unreadable == "skip" and not self.keeps_all

    @property
    def advice(self) -> str:
        """Text to append to the error message of an image that cannot be read."""
        return "" if self.skips else ADVICE

    @property
    def guard(self) -> ReadingGuard:
        """Context in which a sample is read; images that are not files have no such errors."""
        return ReadingGuard(self.data.reader() if self.data.on_disk else None, self.advice)

    def begin(self, stage: str, bit_depth: int | None) -> None:
        """Prepare for a verb; predict lists the test images that cannot be read, too.

        Args:
            stage: The verb.
            bit_depth: Significant bits of the images of the fit, which limit the values of others.
        """
        if stage != "fit" and bit_depth != self.data.reading.bits_in_use:
            self.data.reading.bits_in_use = bit_depth
            self._reasons.clear()
            self.data.listing.forget()
        if self.predicts != (stage == "predict"):
            self.predicts = stage == "predict"
            self.data.listing.forget()

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Add the option to the message of an error in reading files.

        Raises:
            ValueError: In place of an ``OSError`` or a ``ValueError``.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}{self.advice}") from None

    def leaves_out(self, split: Split) -> bool:
        """Return whether images of a split that cannot be read are left out of its samples."""
        return self.skips and self.data.on_disk and not (self.predicts and split == "test")

    def tolerates(self, split: Split) -> bool:
        """Return whether images of a split may be missing: they are left out or described."""
        return self.skips or self.keeps_all or (self.predicts and split == "test")

    def without(self, samples: list[Sample], split: Split) -> list[Sample]:
        """Return the samples of a split without those that cannot be read, if they are left out.

        Raises:
            ValueError: If no sample of a category is left.
        """
        if not self.leaves_out(split):
            return samples
        readable = self.readable(samples)
        left = {sample.category for sample in readable}
        for sample in samples:
            if sample.category not in left:
                reason = self._reasons[self._key(sample)]
                raise ValueError(
                    f"{self.data.root}: category {sample.category!r} has no {split} images that "
                    f"can be read, such as {reason}: add some, or name the other categories in "
                    f"data.categories"
                )
        return readable

    def readable(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples that can be read, or all of them unless the others are left out.

        The files are decoded by several threads, each once in the life of the data module.
        """
        if not (self.skips and self.data.on_disk):
            return list(samples)
        read, new = self.data.reader(), [s for s in samples if self._key(s) not in self._reasons]

        def inspect(sample: Sample) -> str | None:
            return reason_of(sample, read)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                reasons = track(pool.map(inspect, new), "reading images", total=len(new))
                self._reasons.update(zip(map(self._key, new), reasons, strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [sample for sample in samples if self._reasons[self._key(sample)] is None]

    def _key(self, sample: Sample) -> tuple[Path, ...]:
        return (sample.image,) if self.data.mask_rule.lenient else files_of(sample)

    def is_blank(self, mask: Path) -> bool:
        """Return whether the mask of a normal image is empty, or cannot be read and is skipped.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            return not load_mask(mask, self.data.mask_rule).any()
        except (OSError, ValueError) as error:
            if self.skips:  # the image is normal, whatever its mask was
                return True
            raise ValueError(f"{error}{self.advice}") from None

    def is_readable(self, sample: Sample) -> bool:
        """Return whether a sample can be read; True unless the others are left out."""
        return bool(self.readable([sample]))

    def left_out(self, samples: Sequence[Sample]) -> list[UnreadableImage]:
        """Return the images among ``samples`` that were left out, with the index of each."""
        return [
            described(index, sample, reason)
            for index, sample in enumerate(samples)
            if (reason := self._reasons.get(self._key(sample))) is not None
        ]

    def of_fit(self) -> list[UnreadableImage]:
        """Return the training and validation images that were left out of a fit."""
        data = self.data
        images: list[UnreadableImage] = []
        if data.auxiliary is not None:
            images += data.auxiliary.unreadable.of_test()
        elif self.skips and data.on_disk and "train" in data.splits:
            images += self.left_out(data.listing.listed("train"))
        if data.validation.is_test:
            images += self.of_test()
        return images

    def of_references(self) -> list[UnreadableImage]:
        """Return the normal training images that were left out of the draws of references."""
        if not (self.skips and self.data.on_disk):
            return []
        categories = self.data.categories
        return [
            image
            for category in categories
            for image in self.left_out(self.data.listing.normal(category))
        ]

    def summary(self, stage: str) -> str:
        """Return the number of images that are left out of a verb, for its start line."""
        images = self.of_fit() if stage == "fit" else self.of_test()
        return f", without {number_of(len(images), 'unreadable image')}" if images else ""

    def of_test(self) -> list[UnreadableImage]:
        """Return the test images that were left out."""
        if not self.leaves_out("test"):
            return []
        self.data.samples("test")  # they are read now, if they have not been
        return self.left_out(self.data.listing.listed("test"))
