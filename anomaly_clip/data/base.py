"""What a data set lists, and how its samples are read: the half that is the same in every run."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from lightning.pytorch import LightningDataModule

from anomaly_clip.data.file_hashes import Twin, shared_contents
from anomaly_clip.data.image_cache import PictureCache
from anomaly_clip.data.info import DataFacts, facts_of
from anomaly_clip.data.layout import check_files, images_in
from anomaly_clip.data.samples import Reader, Sample, SampleDataset, Split, read_sample
from anomaly_clip.data.transforms import MaskFilter, Resize

__all__ = ["ListedData"]


class ListedData(LightningDataModule, ABC):
    """Categories, listings and tensors; :class:`~anomaly_clip.data.AnomalyData` makes runs of them.

    Args: see :class:`~anomaly_clip.data.AnomalyData`.
    """

    dataset_name: ClassVar[str]
    """Which data set this is; methods look up published settings by it."""
    splits: ClassVar[tuple[Split, ...]] = ("train", "test")
    """Which splits there are."""

    def __init__(
        self,
        root: str,
        categories: list[str] | None,
        train_categories: Literal["same", "others"] | list[str],
        image_size: int | None,
        resize: Resize,
        mask_size: int | None,
        mask_filter: MaskFilter,
        mask_threshold: float,
        cache: bool,
    ) -> None:
        super().__init__()
        for name, size in (("image_size", image_size), ("mask_size", mask_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.{name} must be positive, got {size}")
        if not 0 <= mask_threshold < 1:
            raise ValueError(f"data.mask_threshold must be in [0, 1), got {mask_threshold}")
        if image_size is not None:
            resize.check(image_size)
        try:
            self.root = Path(root).expanduser()
        except RuntimeError as error:  # there is no such user
            raise ValueError(f"data.root {root}: {error}") from None
        self.asked_categories = categories
        self.asked_train_categories = train_categories
        self.image_size = image_size
        self.resize = resize
        self.mask_size = mask_size
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.cache = cache
        self._listings: dict[Split, list[Sample]] = {}
        self._rows: dict[tuple[str, Split], list[Sample]] = {}

    @property
    def facts(self) -> DataFacts:
        """What is published of the data set."""
        return facts_of(self.dataset_name)

    @property
    def has_masks(self) -> bool:
        """Whether the data set has pixel labels."""
        return True

    @property
    def has_labels(self) -> bool:
        """Whether the data set says which images are anomalous."""
        return True

    @abstractmethod
    def find_categories(self) -> list[str]:
        """Return the names of the categories under ``root``, sorted.

        Raises:
            FileNotFoundError: If there is none; it says what was expected and what is there.
        """

    @abstractmethod
    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield the samples of a category, sorted; masks are named even if they are not there."""

    @property
    def categories(self) -> list[str]:
        """The categories in use, in their order.

        Raises:
            FileNotFoundError: If none is found.
            ValueError: If an asked one is not there, or is asked for twice.
        """
        if self.asked_categories is None:
            return self.find_categories()
        return self._checked("categories", self.asked_categories)

    @property
    def train_categories(self) -> list[str]:
        """The categories that ``fit`` learns from.

        Raises:
            FileNotFoundError: If none is found.
            ValueError: If an asked one is not there, is asked for twice, or none is left.
        """
        asked = self.asked_train_categories
        if asked == "same":
            return self.categories
        if isinstance(asked, list):
            return self._checked("train_categories", asked)
        others = [name for name in self.find_categories() if name not in self.categories]
        if not others:
            raise ValueError(
                "data.train_categories others: none is left, as data.categories are all there are "
                f"({', '.join(self.categories)}): choose fewer, or add others to {self.root}"
            )
        return others

    def _checked(self, argument: str, asked: list[str]) -> list[str]:
        found = self.find_categories()
        unknown = [name for name in asked if name not in found]
        if unknown:
            raise ValueError(
                f"data.{argument}: {unknown[0]!r} is not in {self.root} (there: {', '.join(found)})"
            )
        twice = [name for name, count in Counter(asked).items() if count > 1]
        if twice or not asked:
            raise ValueError(
                f"data.{argument}: {f'{twice[0]!r} occurs twice' if twice else 'the list is empty'}"
            )
        return list(asked)

    def samples(self, split: Split) -> list[Sample]:
        """Return the listing of a split, category after category; read once.

        Raises:
            FileNotFoundError: If a mask is missing.
            ValueError: If there is no such split, a category has no sample in it, or a mask has no
                image.
        """
        if split not in self.splits:
            raise ValueError(f"{self.dataset_name} has no {split} images")
        if split not in self._listings:
            listing: list[Sample] = []
            for category in self.train_categories if split == "train" else self.categories:
                rows = self.rows(category, split)
                if not rows:
                    raise ValueError(
                        f"{self.root}: category {category!r} has no {split} images: add some, or "
                        f"name the other categories in data.categories"
                    )
                listing += rows
            if self.on_disk:
                check_files(listing)
            spare = self.spare_masks(self.categories, listing) if split == "test" else []
            if spare:
                raise ValueError(f"{spare[0]}: a mask without an image")
            self._listings[split] = listing
        return self._listings[split]

    def rows(self, category: str, split: Split) -> list[Sample]:
        """Return the samples of a category, read once."""
        if (category, split) not in self._rows:
            self._rows[category, split] = list(self.list_samples(category, split))
        return self._rows[category, split]

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that hold nothing but masks."""
        return []

    def spare_masks(self, categories: Sequence[str], samples: Sequence[Sample]) -> list[Path]:
        """Return the pictures in the categories' folders of masks that are the mask of no sample.

        Args:
            categories: Whose folders are looked at, also those that have no sample.
            samples: The test samples of these categories.
        """
        masks = {sample.mask for sample in samples}
        folders = [folder for name in categories for folder in self.mask_folders(name)]
        return [p for folder in folders for p in images_in(folder) if p not in masks]

    def dataset(self, split: Split) -> SampleDataset:
        """Return a split as tensors, at the sizes in use.

        Raises:
            ValueError: If no image size is known yet.
        """
        return self._tensors(self.samples(split))

    def _tensors(self, samples: Sequence[Sample]) -> SampleDataset:
        if self.image_size is None:
            raise ValueError(
                "data.image_size is not known: give it, or let a trainer set up the data with a "
                "model"
            )
        return SampleDataset(
            samples,
            self.image_size,
            self.mask_size or self.image_size,
            has_masks=self.has_masks,
            mask_filter=self.mask_filter,
            mask_threshold=self.mask_threshold,
            mask_rule=self.facts.mask,
            read=None if self.on_disk else self.reader(),
            resize=self.resize,
            cache=PictureCache(str(self.facts.mask)) if self.cache and self.on_disk else None,
        )

    @property
    def on_disk(self) -> bool:
        """Whether a sample's picture is a file."""
        return True

    def reader(self) -> Reader:
        """Return what reads a sample's image and mask; it travels to the loading processes."""
        return partial(read_sample, rule=self.facts.mask)

    def twins(self, ones: Sequence[Sample], others: Sequence[Sample]) -> list[Twin]:
        """Return which of ``others`` have the content of one of ``ones``."""
        if self.on_disk:
            return shared_contents([s.image for s in ones], [s.image for s in others])
        read = self.reader()
        known = {hashlib.sha256(read(s)[0].tobytes()).digest(): s.image for s in reversed(ones)}
        found = ((hashlib.sha256(read(s)[0].tobytes()).digest(), s.image) for s in others)
        return [Twin(known[digest], image) for digest, image in found if digest in known]
