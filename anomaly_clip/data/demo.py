"""``Demo``: a data set made by code, without a file and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.dataset import AnomalyData, Reader, Sample, Split
from anomaly_clip.data.demo_pictures import CATEGORIES, draw_picture
from anomaly_clip.data.demo_surfaces import fitting_defects
from anomaly_clip.data.transforms import MaskFilter

__all__ = ["Demo"]

KEYS = {category.words: key for key, category in CATEGORIES.items()}
"""From the words that people use, and prompts, to the generator's name."""

FIRST_TEST_INDEX = 1_000_000
"""Test pictures are numbered from here, so that no training picture is ever one of them."""


class Demo(AnomalyData):
    """Inspection photographs made by code, with exact masks; the same for the same seed.

    Half of a category's test pictures are normal; the others go through its kinds of defects.

    Args:
        categories: Which categories to use, by their words; default: all.
        num_train: Normal training pictures a category.
        num_test: Test pictures a category.
        picture_size: Side of the pictures as they are made, in pixels, 64 or more.
        seed: Another seed makes other pictures of the same categories.
        image_size: Side of the square images; default: what the model takes.
        mask_size: Side of masks and anomaly maps; default: the image size.
        mask_filter: How masks are resized.
        mask_threshold: Above which filtered value (0 to 1) a mask's pixel counts as anomalous.
        batch_size: Images of a batch.
        num_workers: Processes that make images; default: one a core, at most 4.
    """

    dataset_name: ClassVar[str] = "Demo"

    def __init__(
        self,
        categories: list[str] | None = None,
        num_train: int = 100,
        num_test: int = 40,
        picture_size: int = 256,
        seed: int = 0,
        image_size: int | None = None,
        mask_size: int | None = None,
        mask_filter: MaskFilter = "bilinear",
        mask_threshold: float = 0.5,
        batch_size: int = 16,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(
            root=f"demo-{seed}",
            categories=categories,
            image_size=image_size,
            mask_size=mask_size,
            mask_filter=mask_filter,
            mask_threshold=mask_threshold,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        for name, value, least in (
            ("num_train", num_train, 1),
            ("num_test", num_test, 1),
            ("picture_size", picture_size, 64),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name} must be {least} or more, got {value}")
        self.num_train = num_train
        self.num_test = num_test
        self.picture_size = picture_size
        self.seed = seed

    def find_categories(self) -> list[str]:
        """Return the words of all categories, sorted."""
        return sorted(KEYS)

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield samples whose paths are names only: ``demo-<seed>/<category>/<split>/...``."""
        folder = self.root / category / split
        if split == "train":
            for index in range(self.num_train):
                yield Sample(folder / "good" / f"{index:07d}.png", category, label=False)
            return
        defects = fitting_defects(CATEGORIES[KEYS[category]])
        num_normal = (self.num_test + 1) // 2
        for number in range(self.num_test):
            normal = number < num_normal
            defect = "good" if normal else defects[(number - num_normal) % len(defects)]
            name = f"{FIRST_TEST_INDEX + number:07d}.png"
            yield Sample(folder / defect / name, category, label=not normal, defect=defect)

    def reader(self) -> Reader:
        """Return what draws a sample's picture and mask."""
        return partial(_draw_sample, seed=self.seed, size=self.picture_size)


def _draw_sample(
    sample: Sample, seed: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    index = int(Path(sample.image).stem)
    picture = draw_picture(KEYS[sample.category], seed, index, sample.defect, size)
    return picture.image, picture.mask
