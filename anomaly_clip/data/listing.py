"""The categories and samples of a data set, found and listed once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from anomaly_clip.data.layout import check_files
from anomaly_clip.data.samples import Sample, Split

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["Listing", "TrainCategories"]

TrainCategories = Literal["same", "others"] | list[str]


class Listing:
    """Categories in use and their samples; a data module says where they are found.

    Args:
        source: The data module: ``find_categories``, ``list_samples``, ``splits``.
        categories: The categories to use, in this order; default: all that are found.
        train_categories: The categories that ``fit`` learns from: same, or others (all that are
            found but ``categories``), or a list.
    """

    def __init__(
        self, source: AnomalyData, categories: list[str] | None, train_categories: TrainCategories
    ) -> None:
        self.source = source
        self.chosen = categories
        self.chosen_for_training = train_categories
        self._rows: dict[tuple[str, Split], list[Sample]] = {}
        self._samples: dict[Split, list[Sample]] = {}

    @property
    def categories(self) -> list[str]:
        """See :attr:`~anomaly_clip.data.AnomalyData.categories`."""
        if self.chosen is None:
            return self.source.find_categories()
        return self._checked("categories", self.chosen)

    @property
    def train_categories(self) -> list[str]:
        """See :attr:`~anomaly_clip.data.AnomalyData.train_categories`."""
        if self.chosen_for_training == "same":
            return self.categories
        if isinstance(self.chosen_for_training, list):
            return self._checked("train_categories", self.chosen_for_training)
        others = [n for n in self.source.find_categories() if n not in self.categories]
        if not others:
            raise ValueError(
                "data.train_categories others: none is left, as data.categories are all there are "
                f"({', '.join(self.categories)}): choose fewer, or add others to {self.source.root}"
            )
        return others

    def _checked(self, argument: str, names: list[str]) -> list[str]:
        there = self.source.find_categories()
        unknown = [name for name in names if name not in there]
        if unknown:
            raise ValueError(
                f"data.{argument}: {unknown[0]!r} is not in {self.source.root} "
                f"(there: {', '.join(there)})"
            )
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            raise ValueError(
                f"data.{argument}: {f'{twice[0]!r} occurs twice' if twice else 'the list is empty'}"
            )
        return list(names)

    def rows(self, category: str, split: Split) -> list[Sample]:
        """Return the samples of a category, read once."""
        if (category, split) not in self._rows:
            self._rows[category, split] = list(self.source.list_samples(category, split))
        return self._rows[category, split]

    def normal(self, category: str) -> list[Sample]:
        """Return the normal training images of a category."""
        return [sample for sample in self.rows(category, "train") if not sample.label]

    def samples(self, split: Split) -> list[Sample]:
        """See :meth:`~anomaly_clip.data.AnomalyData.samples`."""
        source = self.source
        if split not in source.splits:
            raise ValueError(f"{source.dataset_name} has no {split} images")
        if split not in self._samples:
            samples: list[Sample] = []
            for category in self.train_categories if split == "train" else self.categories:
                rows = self.rows(category, split)
                if not rows:
                    raise ValueError(
                        f"{source.root}: category {category!r} has no {split} images: add some, or "
                        f"name the other categories in data.categories"
                    )
                samples += rows
            if source.on_disk:
                check_files(samples)
            spare = source.spare_masks(self.categories, samples) if split == "test" else []
            if spare:
                raise ValueError(f"{spare[0]}: a mask without an image")
            self._samples[split] = samples
        return self._samples[split]
