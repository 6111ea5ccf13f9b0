"""``Demo``: a data set made by code, without a file and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.dataset import AnomalyData, Reader, Sample, Split
from anomaly_clip.data.demo_pictures import CATEGORIES, draw_picture
from anomaly_clip.data.demo_surfaces import fitting_defects

__all__ = ["Demo"]

KEYS = {category.words: key for key, category in CATEGORIES.items()}
"""From the words that people use, and prompts, to the generator's name."""

FIRST_TEST_INDEX = 1_000_000
"""Test pictures are numbered from here, so that no training picture is ever one of them."""


class Demo(AnomalyData):
    """Inspection photographs made by code, with exact masks; the same for the same seed.

    Half of a category's test pictures are normal; the others go through its kinds of defects.

    Args:
        num_train: Normal training pictures a category.
        num_test: Test pictures a category.
        picture_size: Side of the pictures as they are made, in pixels, 64 or more.
        seed: Another seed makes other pictures of the same categories.
        shared: Arguments of all data modules but ``root``; categories go by their words.
    """

    dataset_name: ClassVar[str] = "Demo"

    def __init__(
        self,
        num_train: int = 100,
        num_test: int = 40,
        picture_size: int = 256,
        seed: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(root=f"demo-{seed}", **shared)
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
