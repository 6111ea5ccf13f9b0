"""Members of a data module that each data set defines: names, splits, samples, reading."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning.pytorch import LightningDataModule

from anomaly_clip.data.copies import original_of
from anomaly_clip.data.file_hashes import DuplicatePair, equal_images
from anomaly_clip.data.info import DatasetInfo, MaskRule, dataset_info
from anomaly_clip.data.known_layouts import unsupported
from anomaly_clip.data.layout import images_in
from anomaly_clip.data.samples import Reader, Sample, Split, read_sample
from anomaly_clip.folders import image_files

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
    omits_copies: bool = False
    """True if copies that a file manager made, such as ``a (copy).png``, are not listed. Layouts
    that pair images and masks by name omit them; others list every image."""
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

    def check_root(self) -> None:
        """Check that ``root`` is a folder, or a file that the data set reads.

        Raises:
            FileNotFoundError: If it is not; the message lists the expected content.
        """
        if not self.root.is_dir():
            self.find_categories()  # explains what is expected

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

    def group_of(self, sample: Sample) -> str | None:
        """Return the group of an image, such as the part that it shows; None if it is alone."""
        return None

    @property
    def has_default_name(self) -> bool:
        """True if the only category has the name of its folder, as no other was given."""
        return False

    @property
    def is_tested_after_fit(self) -> bool:
        """True if there are images to test on after a fit."""
        return "test" in self.splits

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
        """Return the existing masks of normal images, which must be empty.

        Args:
            categories: Categories whose mask folders are searched.
            samples: The test samples of these categories.
        """
        return [s.mask for s in samples if s.mask is not None and not s.label]

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the masks that belong to no sample; copies of other masks are left out.

        Those of normal images belong to them.

        Args:
            categories: Categories whose mask folders are searched, even those without samples.
            samples: The test samples of these categories.
        """
        masks = {sample.mask for sample in samples} | set(self.normal_masks(categories, samples))
        folders = [folder for name in categories for folder in self.mask_folders(name)]
        spare = [p for folder in folders for p in images_in(folder) if p not in masks]
        return [mask for mask in spare if original_of(mask) not in masks - {None}]

    def in_draw_order(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return samples in the order from which random choices are made; here their own order.

        The choices are few shots, references, held-out images, synthetic defects and the order of
        shuffled training images.
        """
        return list(samples)

    def left_out(self, stage: str) -> dict[str, list[Path]]:
        """Return the images that a stage does not use, by what they are, such as "copy".

        They are counted on the start line and by ``check``.

        Args:
            stage: fit, validate, test or predict.
        """
        return {}

    def more_training_images(self) -> str:
        """Return what to do for more training images."""
        return "add images, or raise data.shots or data.fraction"

    @cached_property
    def unsupported(self) -> str | None:
        """The message if the folder is a published set that is not supported; looked up once."""
        return unsupported(self.root)

    def refuse_unsupported(self) -> None:
        """Refuse a published data set that is not supported.

        Raises:
            ValueError: If the folder is one.
        """
        if self.unsupported is not None:
            raise ValueError(self.unsupported)

    @property
    def is_published(self) -> bool:
        """True if the folder holds the published data set, not a user's own in the same layout.

        At least two of the published categories must be there, or the only one.
        """
        counts = self.info.counts
        present = set(counts) & set(self.find_categories())
        return len(present) >= min(2, len(counts))

    @property
    def known_duplicates(self) -> int | None:
        """Number of duplicates that the published archive is known to contain; None: some."""
        return self.info.duplicates if self.is_published else 0

    def image_files(self, runs: list[Path] | None = None) -> Iterator[Path]:
        """Yield all image files of the data set's folder, listed or not.

        Args:
            runs: List to which folders of results are added, which are left out.
        """
        return image_files(self.root, runs)

    @property
    def remarks(self) -> list[str]:
        """Remarks on how the data set's folder was understood, and what is not used."""
        return []

    def duplicates(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[DuplicatePair]:
        """Return the samples of ``second`` whose decoded image also occurs in ``first``.

        Each is paired with the first such sample of ``first``. Files that cannot be decoded are
        compared by their content.
        """
        if self.on_disk:
            return equal_images(
                [s.image for s in first], [s.image for s in second], self.reading.max_pixels
            )
        read = self.reader()

        def digest_of(sample: Sample) -> bytes:
            return hashlib.sha256(read(sample)[0].tobytes()).digest()

        first_images = {digest_of(sample): sample.image for sample in reversed(first)}
        digests = ((digest_of(sample), sample.image) for sample in second)
        return [DuplicatePair(first_images[d], image) for d, image in digests if d in first_images]
