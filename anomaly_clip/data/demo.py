"""``Demo``: a generated data set, which needs no files and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from anomaly_clip.data.dataset import AnomalyData, Reader, Sample, Split
from anomaly_clip.data.file_hashes import DuplicatePair
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.data.scenes import Scenes
from anomaly_clip.demo.photographs import CATEGORIES, DEFECTS, NAME_OF_WORDS, draw_photograph
from anomaly_clip.demo.surfaces import fitting_defects
from anomaly_clip.errors import check_at_least
from anomaly_clip.records import Batch

__all__ = ["Demo"]

FIRST_TEST_INDEX = 1_000_000
"""Number of the first test image; training images have lower numbers."""


class Demo(AnomalyData):
    """Generated inspection photographs with exact masks; equal seeds give equal images.

    Half of a category's test images are normal; the other half cycles through the kinds of defect
    that the category can have.

    Args:
        num_train: Normal training images per category.
        num_test: Test images per category.
        picture_size: Side of the generated images before resizing, in pixels, 64 or more.
        seed: Seed of the images, and of everything that ``seed`` controls in all data modules.
        num_scenes: Number of scenes per epoch of ``fit``, over all training categories, for
            methods that train on pairs: each scene is shown without and with a defect. Every epoch
            has new scenes.
        held_out_defects: Kinds of defect that these scenes never show.
        shared: Arguments common to all data modules, except ``root``. Categories are given by their
            names in prompts.
    """

    dataset_name: ClassVar[str] = "Demo"

    def __init__(
        self,
        num_train: int = 100,
        num_test: int = 40,
        picture_size: int = 256,
        seed: int = 0,
        num_scenes: int | None = None,
        held_out_defects: list[str] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(root=f"demo-{seed}", seed=seed, **shared)
        for name, value, least in (
            ("num_train", num_train, 1),
            ("num_test", num_test, 1),
            ("picture_size", picture_size, 64),
            ("num_scenes", 1 if num_scenes is None else num_scenes, 1),
        ):
            check_at_least(f"data.{name}", value, least)
        if (
            num_scenes is not None
            and self.synthesis is not None
            and not self.validation.is_synthetic
        ):
            raise ValueError(
                f"data.num_scenes {num_scenes} generates scenes with defects of their own: leave "
                f"data.synthesis ({self.synthesis.recipe}) out"
            )
        self.held_out_defects = list(held_out_defects or [])
        unknown = [name for name in self.held_out_defects if name not in DEFECTS]
        if unknown:
            raise ValueError(
                f"data.held_out_defects: {unknown[0]!r} is not a kind of defect; choose from "
                f"{', '.join(DEFECTS)}"
            )
        self.num_train = num_train
        self.num_test = num_test
        self.picture_size = picture_size
        if num_scenes is not None and self.augmentation is not None:
            raise ValueError(
                f"data.num_scenes {num_scenes} generates scenes that differ anyway: leave "
                f"data.augment out, got {len(self.augmentation.settings)} transforms"
            )
        self.num_scenes = num_scenes

    def find_categories(self) -> list[str]:
        """Return the names in prompts of all categories, sorted."""
        return sorted(NAME_OF_WORDS)

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """Yield samples with virtual paths, ``demo-<seed>/<category>/<split>/...``."""
        folder = self.root / category / split
        if split == "train":
            for index in range(self.num_train):
                yield Sample(folder / "good" / f"{index:07d}.png", category, label=False)
            return
        defects = fitting_defects(CATEGORIES[NAME_OF_WORDS[category]])
        num_normal = (self.num_test + 1) // 2
        for number in range(self.num_test):
            normal = number < num_normal
            defect = "good" if normal else defects[(number - num_normal) % len(defects)]
            name = f"{FIRST_TEST_INDEX + number:07d}.png"
            yield Sample(folder / defect / name, category, label=not normal, defect=defect)

    @property
    def on_disk(self) -> bool:
        """False: images are generated when they are read."""
        return False

    def duplicates(self, first: Sequence[Sample], second: Sequence[Sample]) -> list[DuplicatePair]:
        """Return the samples that are in both lists; equal paths mean equal images."""
        first_images = {sample.image for sample in first}
        return [DuplicatePair(s.image, s.image) for s in second if s.image in first_images]

    def reader(self) -> Reader:
        """Return the function that generates a sample's image and mask."""
        return partial(_draw_sample, seed=self.seed, size=self.picture_size)

    def scenes(self) -> Scenes:
        """Return the scenes of an epoch of ``fit``.

        Raises:
            ValueError: If the number of scenes or the image size is not set, or if every kind of
                defect of a category is held out.
        """
        if self.num_scenes is None:
            raise ValueError(
                f"data.num_scenes is {self.num_scenes}: set the number of scenes (pairs of images "
                f"without and with a defect) per epoch of fit"
            )
        if self.image_size is None:
            raise ValueError(
                f"data.image_size is {self.image_size}: set it, or let a trainer set it"
            )
        return Scenes(
            self.train_categories,
            self.num_scenes,
            self.seed,
            self.picture_size,
            self.image_size,
            self.held_out_defects,
        )

    def summary(self, stage: str) -> str:
        """Describe the images or scenes of a stage in one line."""
        if stage != "fit" or self.num_scenes is None:
            return super().summary(stage)
        number = len(self.train_categories)
        return f"{self.num_scenes} scenes per epoch, of {number} categories"

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return scenes without and with a defect, new ones each epoch, or training images."""
        if self.num_scenes is None:
            return super().train_dataloader()
        scenes = self.scenes()
        trainer = self.trainer
        world = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        sampler = EpochSampler(scenes, self.seed, *world)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"data.num_scenes {self.num_scenes} is less than a batch of data.batch_size "
                f"{self.batch_size} for each of {world[0]} processes: raise data.num_scenes or "
                f"lower data.batch_size"
            )
        return DataLoader(
            scenes,  # type: ignore[arg-type]  # default collation makes a Batch of ScenePairs
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )


def _draw_sample(
    sample: Sample, seed: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    index = int(Path(sample.image).stem)
    picture = draw_photograph(NAME_OF_WORDS[sample.category], seed, index, sample.defect, size)
    return picture.image, picture.mask
