"""The categories of a data set and their samples, listed once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from anomaly_clip.data.copies import split_copies
from anomaly_clip.data.layout import MASK_OF_NORMAL, check_images, check_masks, spare_mask
from anomaly_clip.data.samples import Sample, Split

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = [
    "Listing",
    "TrainCategories",
]

TrainCategories = Literal["same", "others"] | list[str]


class Listing:
    """The categories in use and their samples.

    Args:
        source: The data module, which provides ``find_categories``, ``list_samples``, ``splits``.
        categories: The categories to use, in this order; default: all.
        train_categories: The categories that ``fit`` trains on: same, others (all categories
            except ``categories``), or a list.
    """

    def __init__(
        self, source: AnomalyData, categories: list[str] | None, train_categories: TrainCategories
    ) -> None:
        self.source = source
        self.chosen = categories
        self.chosen_for_training = train_categories
        self.needs_masks = True
        """True if masks are used, so that missing and odd ones are errors."""
        self._masks_checked: set[Split] = set()
        self._rows: dict[tuple[str, Split], list[Sample]] = {}
        self._fitted_rows: dict[str, list[Sample]] = {}
        self._listed: dict[Split, list[Sample]] = {}
        self._samples: dict[tuple[Split, bool], list[Sample]] = {}
        self._copies: dict[tuple[str, Split], list[Sample]] = {}

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
                f"data.train_categories others: none is left, because data.categories lists all "
                f"({', '.join(self.categories)}): list fewer categories, or add others to "
                f"{self.source.root}"
            )
        return others

    def _checked(self, argument: str, names: list[str]) -> list[str]:
        available = self.source.find_categories()
        unknown = [name for name in names if name not in available]
        if unknown:
            raise ValueError(
                f"data.{argument}: {unknown[0]!r} is not in {self.source.root} "
                f"(available: {', '.join(available)})"
            )
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"data.{argument}: {repeated[0]!r} occurs twice: list it once")
        if not names:
            raise ValueError(
                f"data.{argument}: the list is empty: name one or more of {', '.join(available)}"
            )
        return list(names)

    def forget(self) -> None:
        """Forget all samples, because the data module now lists others."""
        self._rows.clear()
        self._fitted_rows.clear()
        self._listed.clear()
        self._samples.clear()
        self._masks_checked.clear()
        self._copies.clear()

    def rows(self, category: str, split: Split) -> list[Sample]:
        """Return the samples of a category and split; later calls return the same list.

        Training images that are held out to calibrate on are not among them.
        """
        rows = self.all_rows(category, split)
        if split != "train" or self.source.calibration.hold_out is None:
            return rows
        if category not in self._fitted_rows:
            self._fitted_rows[category] = self.source.calibration.without_held(category, rows)
        return self._fitted_rows[category]

    def all_rows(self, category: str, split: Split) -> list[Sample]:
        """Return the samples of a category and split, with those held out to calibrate on."""
        if (category, split) not in self._rows:
            rows = list(self.source.list_samples(category, split))
            if self.source.omits_copies:
                rows, self._copies[category, split] = split_copies(rows)
            self._rows[category, split] = rows
        return self._rows[category, split]

    def copies(self, split: Split) -> list[Sample]:
        """Return the copies of other images among the rows listed so far, which are not used."""
        listed = self._copies.items()
        return [sample for (_, part), rows in listed if part == split for sample in rows]

    def normal(self, category: str) -> list[Sample]:
        """Return a category's normal training images, in the order of random choices."""
        normal = [sample for sample in self.rows(category, "train") if not sample.label]
        return self.source.in_draw_order(normal)

    def samples(self, split: Split) -> list[Sample]:
        """See :meth:`~anomaly_clip.data.AnomalyData.samples`."""
        listed, key = self.listed(split), (split, self.needs_masks)
        if key not in self._samples:
            self._samples[key] = self.source.unreadable.without(listed, split)
        return self._samples[key]

    def listed(self, split: Split) -> list[Sample]:
        """Return all samples of a split, with those that cannot be read; errors as `samples`."""
        source = self.source
        if split == "test" and source.calibration.is_scored:
            if split not in self._listed:
                self._listed[split] = source.calibration.samples()
            return self._listed[split]
        if split not in source.splits:
            raise ValueError(
                f"{source.dataset_name} has no {split} images: choose a data set that has some"
            )
        if split not in self._listed:
            samples: list[Sample] = []
            for category in self.train_categories if split == "train" else self.categories:
                rows = self.rows(category, split)
                if not rows:
                    raise ValueError(
                        f"{source.root}: category {category!r} has no {split} images: add some, or "
                        f"name the other categories in data.categories"
                    )
                samples += rows
            if source.on_disk and not source.unreadable.tolerates(split):
                check_images(samples)
            self._listed[split] = samples
        if self.needs_masks and split not in self._masks_checked:
            self._check_masks(split)
            self._masks_checked.add(split)
        return self._listed[split]

    def _check_masks(self, split: Split) -> None:
        source, samples = self.source, self._listed[split]
        if source.on_disk:
            check_masks(samples, source.mask_endings, source.mask_hint)
        if split != "test":
            return
        spare = source.spare_masks(self.categories, samples)
        if spare:
            raise ValueError(f"{spare[0]}: {spare_mask(spare, samples, bool(source.mask_hint))}")
        for mask in source.normal_masks(self.categories, samples):
            if not source.unreadable.is_blank(mask):
                raise ValueError(
                    f"{mask}: {MASK_OF_NORMAL}: move the image to the folder of its defect, or "
                    f"delete the mask"
                )
