"""The categories of a data set and their samples, listed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anomaly_clip.data.copies import split_copies
from anomaly_clip.data.layout import check_files
from anomaly_clip.data.samples import Sample, Split
from anomaly_clip.images import read_mask

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["Listing", "TrainCategories", "left_out_remark"]

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
        self._rows: dict[tuple[str, Split], list[Sample]] = {}
        self._samples: dict[Split, list[Sample]] = {}
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
        self._samples.clear()
        self._copies.clear()

    def rows(self, category: str, split: Split) -> list[Sample]:
        """Return the samples of a category and split; later calls return the same list."""
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
        """Return the normal training images of a category."""
        return [sample for sample in self.rows(category, "train") if not sample.label]

    def samples(self, split: Split) -> list[Sample]:
        """See :meth:`~anomaly_clip.data.AnomalyData.samples`."""
        source = self.source
        if split not in source.splits:
            raise ValueError(
                f"{source.dataset_name} has no {split} images: choose a data set that has some"
            )
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
                raise ValueError(
                    f"{spare[0]}: a mask without an image: add its image, or remove the mask"
                )
            if split == "test":
                _check_empty(source.masks_of_normal(samples))
            self._samples[split] = samples
        return self._samples[split]


def left_out_remark(root: Path, kind: str, images: Sequence[Path]) -> str:
    """Return a sentence on images that are not used; empty without any.

    Example:
        >>> from pathlib import Path
        >>> from anomaly_clip.data.listing import left_out_remark
        >>> left_out_remark(Path("a"), "copy", [Path("a/b (1).png")])
        '1 copy is not used: b (1).png'
        >>> left_out_remark(Path("a"), "copy", [Path("a/b (1).png"), Path("a/b (2).png")])
        '2 copies are not used, such as b (1).png'
    """
    if not images:
        return ""
    example = images[0].relative_to(root).as_posix() if root in images[0].parents else images[0]
    if len(images) == 1:
        return f"1 {kind} is not used: {example}"
    noun, of, rest = kind.partition(" of ")
    plural = f"{noun.removesuffix('y')}ies" if noun.endswith("y") else f"{noun}s"
    return f"{len(images)} {plural}{of}{rest} are not used, such as {example}"


def _check_empty(masks: Iterable[Path]) -> None:
    for mask in masks:
        if read_mask(mask).any():
            raise ValueError(
                f"{mask}: the mask of a normal image is not empty: move the image to the folder of "
                f"its defect, or delete the mask"
            )
