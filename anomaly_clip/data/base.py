"""Members of a data module that each data set defines: names, splits, samples, reading."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning.pytorch import LightningDataModule

from anomaly_clip.data.file_hashes import DuplicatePair, duplicates_between
from anomaly_clip.data.info import DatasetInfo, MaskRule, dataset_info
from anomaly_clip.data.layout import images_in
from anomaly_clip.data.samples import Reader, Sample, Split, read_sample

if TYPE_CHECKING:
    from anomaly_clip.data.reading import ImageReading

__all__ = ["BaseDataModule"]


class BaseDataModule(LightningDataModule, ABC):
    """Members of a data module that differ between data sets.

    Most subclasses of :class:`~anomaly_clip.data.AnomalyData` override members of this class only.
    """

    root: Path
    """The data set's folder."""
    reading: ImageReading
    """Settings of reading the images."""
    dataset_name: ClassVar[str]
    """The data set's name, by which methods look up published settings."""
    splits: ClassVar[tuple[Split, ...]] = ("train", "test")
    """The splits that exist."""
    targets: Literal["single", "multi"] | None = None
    """``single``: one class per image; ``multi``: several; None: images have no classes."""
    num_scenes: int | None = None
    """Scenes per epoch of ``fit``, each shown without and with a defect; None: no scenes."""

    @abstractmethod
    def find_categories(self) -> list[str]:
        """Return the names of the categories under ``root``, sorted.

        Raises:
            FileNotFoundError: If there is no category; the message lists the expected and the
                actual content.
        """

    @abstractmethod
    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield the samples of a category and split, sorted.

        If a mask file is missing, the sample still has the path at which the mask is expected.
        """

    @property
    def info(self) -> DatasetInfo:
        """Published counts, category names, mask rule and source of the data set."""
        return dataset_info(self.dataset_name)

    @property
    def has_masks(self) -> bool:
        """True if the data set has pixel labels."""
        return True

    @property
    def has_labels(self) -> bool:
        """True if the images are labelled as normal or anomalous."""
        return True

    @property
    def on_disk(self) -> bool:
        """True if each sample's image is a file of its own."""
        return True

    @property
    def target_names(self) -> list[str]:
        """Names of the columns of a batch's ``target``; empty if images have no classes."""
        return []

    @property
    def mask_rule(self) -> MaskRule:
        """Rule for reading mask files: the data set's, with the user's settings."""
        return self.info.mask

    def reader(self) -> Reader:
        """Return the function that reads a sample's image and mask.

        Each data loader worker receives a copy of the function.
        """
        return partial(read_sample, rule=self.mask_rule, reading=self.reading.rule)

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that contain only masks."""
        return []

    @property
    def mask_endings(self) -> Sequence[str]:
        """Endings that the name of a mask may have after that of its image; empty if unknown."""
        return ()

    @property
    def mask_hint(self) -> str:
        """Advice for masks that are not found; empty if there is none."""
        return ""

    def normal_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks of normal images, which must be empty.

        Args:
            categories: Categories whose mask folders are searched.
            samples: The test samples of these categories.
        """
        return []

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks that belong to no sample.

        Args:
            categories: Categories whose mask folders are searched, even those without samples.
            samples: The test samples of these categories.
        """
        masks = {sample.mask for sample in samples}
        folders = [folder for name in categories for folder in self.mask_folders(name)]
        return [p for folder in folders for p in images_in(folder) if p not in masks]

    def duplicates(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[DuplicatePair]:
        """Return the samples of ``second`` whose image content also occurs in ``first``.

        Each is paired with the first such sample of ``first``.
        """
        if self.on_disk:
            return duplicates_between([s.image for s in first], [s.image for s in second])
        read = self.reader()

        def digest_of(sample: Sample) -> bytes:
            return hashlib.sha256(read(sample)[0].tobytes()).digest()

        first_images = {digest_of(sample): sample.image for sample in reversed(first)}
        digests = ((digest_of(sample), sample.image) for sample in second)
        return [DuplicatePair(first_images[d], image) for d, image in digests if d in first_images]
