"""The data module that all data sets share; a data set differs by a listing function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from types import MethodType
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, default_collate

from anomaly_clip.data.base import ListedData
from anomaly_clip.data.file_hashes import Twin
from anomaly_clip.data.loaders import EpochLoader
from anomaly_clip.data.samplers import (
    Batches,
    CategoryBatches,
    EpochSampler,
    EvenBatches,
    SupportedBatches,
    draw_few,
    hold_out,
    normal_rows,
)
from anomaly_clip.data.samples import Item, Reader, Sample, SampleDataset, Split, read_sample
from anomaly_clip.data.synthetic import SyntheticDataset, SyntheticTwins
from anomaly_clip.data.transforms import MaskFilter, Resize
from anomaly_clip.images import read_image, read_mask
from anomaly_clip.records import Batch
from anomaly_clip.synthesis.synthesizer import SynthesisSettings

__all__ = [
    "AnomalyData",
    "Item",
    "Reader",
    "Sample",
    "SampleDataset",
    "Split",
    "ValSplit",
    "read_image",
    "read_mask",
    "read_sample",
]

ValSplit = Literal["none", "synthetic", "auxiliary", "test"]


class AnomalyData(ListedData):
    """The data module of all data sets; a subclass says what is listed where.

    Args:
        root: The data set's folder.
        categories: Which categories to use, in this order; default: all that are found, sorted.
        train_categories: Which categories ``fit`` learns from: same, or others (all that are found
            but ``categories``), or a list.
        image_size: Side of the square images; default: what the model takes.
        resize: How pictures become square.
        mask_size: Side at which masks and maps are compared; default: the image size.
        mask_filter: How masks are resized.
        mask_threshold: Above which filtered value (0 to 1) a mask's pixel counts as anomalous.
        words: What categories are called in sentences, by category; default: their names.
        auxiliary: Another data set whose labelled test split is what ``fit`` learns from, with its
            own batch_size, balanced and shuffle.
        val_split: What validates during ``fit``: none; synthetic (a share of the normal training
            images, which are then not trained on, each without and with a defect of
            ``synthesis``, whose share may be 0 for training);
            auxiliary (a share of it, which is then not trained on); test, which selects on test
            images and is written into the results.
        val_share: How much of what is learnt from validates instead, of each category, if
            val_split is synthetic or auxiliary.
        synthesis: Which synthetic defects training images get; default: none.
        shots: How many normal training images a category has, drawn by the seed, fewer always
            among more; default: all.
        fraction: Instead of shots: the share of each category's normal training images, one at
            least; default: all.
        seed: Draws shots and the order of training.
        balanced: Whether each category is seen equally often in training.
        shuffle: Whether training images come in another order each epoch, or as they are listed.
        allow_overlap: Whether test images may be among the training images, by content.
        cache: Whether to keep decoded and resized pictures on disk, in the cache folder.
        batch_size: Images of a batch.
        num_workers: Processes that load images; default: one a core, at most 4.
    """

    def __init__(
        self,
        root: str,
        categories: list[str] | None = None,
        train_categories: Literal["same", "others"] | list[str] = "same",
        image_size: int | None = None,
        resize: Resize = Resize(),
        mask_size: int | None = None,
        mask_filter: MaskFilter = "bilinear",
        mask_threshold: float = 0.5,
        words: dict[str, str] | None = None,
        auxiliary: AnomalyData | None = None,
        val_split: ValSplit = "none",
        val_share: float = 0.1,
        synthesis: SynthesisSettings | None = None,
        shots: int | None = None,
        fraction: float | None = None,
        seed: int = 0,
        balanced: bool = False,
        shuffle: bool = True,
        allow_overlap: bool = False,
        cache: bool = False,
        batch_size: int = 16,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(
            root,
            categories,
            train_categories,
            image_size,
            resize,
            mask_size,
            mask_filter,
            mask_threshold,
            cache,
        )
        if shots is not None and shots < 1:
            raise ValueError(f"data.shots must be positive, got {shots}")
        if fraction is not None and (shots is not None or not 0 < fraction <= 1):
            raise ValueError(
                f"data.fraction must be in (0, 1], in place of data.shots, got {fraction}"
            )
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share must be between 0 and 1, got {val_share}")
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be positive, got {batch_size}")
        if seed < 0:
            raise ValueError(f"data.seed must be 0 or more, got {seed}")
        if balanced and not shuffle:
            raise ValueError("data.balanced true draws images, so data.shuffle must be true")
        some = shots is not None or fraction is not None
        if auxiliary is not None and (auxiliary.auxiliary is not None or some):
            raise ValueError(
                "data.auxiliary is all that is learnt from: it takes no auxiliary of its own, and "
                "data.shots and data.fraction must be left out"
            )
        if synthesis is not None and auxiliary is not None:
            raise ValueError(
                "data.synthesis makes defects on normal training images, which data.auxiliary "
                "replaces: leave one of them out"
            )
        if val_split == "synthetic" and synthesis is None:
            raise ValueError(
                "data.val_split synthetic: say which defects, as --data.synthesis.recipe nsa"
            )
        if val_split == "auxiliary" and auxiliary is None:
            raise ValueError("data.val_split auxiliary: name one with data.auxiliary")
        self._in_fit: dict[str, SampleDataset | SyntheticDataset | SyntheticTwins] = {}
        self.own_words = words or {}
        self.auxiliary: AnomalyData | None = auxiliary
        self.val_split = val_split
        self.val_share = val_share
        self.synthesis = synthesis
        if val_split == "none":  # Lightning then sees no loader; an empty one makes it warn
            self.val_dataloader = MethodType(LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]
        self.shots = shots
        self.fraction = fraction
        self.seed = seed
        self.balanced = balanced
        self.shuffle = shuffle
        self.allow_overlap = allow_overlap
        self.batch_size = batch_size
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers

    def validation_categories(self) -> list[str]:
        """Return the categories of what validates during ``fit``."""
        if self.val_split == "auxiliary":
            assert self.auxiliary is not None
            return self.auxiliary.categories
        return self.train_categories if self.val_split == "synthetic" else self.categories

    def words(self, category: str) -> str:
        """Return what a category, of this set or the auxiliary one, is called in sentences."""
        known = {**self.facts.words, **self.own_words}
        own = category in known or self.auxiliary is None or category in self.categories
        return known.get(category, category) if own else self.auxiliary.words(category)  # type: ignore[union-attr]

    def fit_samples(self) -> list[Sample]:
        """Return what ``fit`` learns from: training images, or an auxiliary set's test split."""
        if self.auxiliary is not None:
            return self._auxiliary_parts[0]
        if self.val_split == "synthetic" and not self.has_shots:
            return self._normal_parts[0]
        return self._train_samples()

    def _train_samples(self) -> list[Sample]:
        if not self.has_shots:
            return self.samples("train")
        chosen: list[Sample] = []
        for category in self.train_categories:
            chosen += self.shots_of(category)
        return chosen

    @property
    def has_shots(self) -> bool:
        """Whether only some of the normal training images are used."""
        return self.shots is not None or self.fraction is not None

    def shots_of(self, category: str) -> list[Sample]:
        """Return a category's few normal training images, drawn by (seed, category).

        Raises:
            ValueError: If neither ``shots`` nor ``fraction`` is given, or there are fewer images.
        """
        if not self.has_shots:
            raise ValueError("data.shots is not given: it says how many normal images there are")
        if "train" not in self.splits:
            raise ValueError(f"{self.dataset_name} has no train images, so there are no shots")
        normal = [s for s in self.rows(category, "train") if not s.label]
        if self.val_split == "synthetic":  # what validates is the same however few are trained on
            held = set(self._normal_parts[1])
            normal = [sample for sample in normal if sample not in held]
        few = self.shots
        if few is None:
            few = max(1, round(self.fraction * len(normal)))  # type: ignore[operator]
        if len(normal) < few:
            raise ValueError(
                f"data.shots {self.shots}: category {category!r} has {len(normal)} normal "
                f"training images"
            )
        return [normal[row] for row in draw_few(len(normal), few, self.seed, category)]

    def drawn_of(self, category: str, count: int, seed: int) -> list[Sample]:
        """Return as many normal training images of a category as a method asks for.

        Args:
            category: Whose images; it need not be trained on.
            count: How many.
            seed: Draws them, with the category's name.

        Raises:
            ValueError: If there are no training images, or fewer.
        """
        if "train" not in self.splits:
            raise ValueError(
                f"{self.dataset_name} has no train images, so there are none to compare with: "
                f"take a data set that has some"
            )
        normal = [s for s in self.rows(category, "train") if not s.label]
        if len(normal) < count:
            raise ValueError(
                f"model.shots {count}: category {category!r} has {len(normal)} normal training "
                f"images in {self.root}: ask for fewer, or add some"
            )
        return [normal[row] for row in draw_few(len(normal), count, seed, category)]

    def references(self, category: str, count: int | None = None, seed: int = 0) -> Batch:
        """Return a few normal images of a category, for methods that compare with them.

        Args:
            category: Whose images.
            count: How many; default: those of ``shots`` or ``fraction``, drawn by the data's seed.
            seed: Draws them if ``count`` is given.

        Returns:
            A batch: ``image`` uint8 ``(k, 3, H, W)``, ``path`` and the rest.

        Raises:
            ValueError: As :meth:`shots_of` or :meth:`drawn_of`, or if one of them is a test image.
        """
        chosen = self.shots_of(category) if count is None else self.drawn_of(category, count, seed)
        self._refuse_overlap(chosen)
        dataset = self._tensors(chosen)
        return cast("Batch", default_collate([dataset[row] for row in range(len(chosen))]))

    def overlap(self, samples: Sequence[Sample] | None = None) -> list[Twin]:
        """Return the test images that are among the training images, by content.

        Args:
            samples: The training images; default: what ``fit`` learns from.
        """
        if "test" not in self.splits:
            return []
        trained = self.fit_samples() if samples is None else samples
        return self.twins(trained, self.samples("test"))

    def _refuse_overlap(self, samples: Sequence[Sample]) -> None:
        twins = [] if self.allow_overlap else self.overlap(samples)
        if twins:
            raise ValueError(
                f"{len(twins)} test images are among the training images, such as "
                f"{twins[0].other} = {twins[0].one}: remove them, or allow it with "
                f"data.allow_overlap true"
            )

    @cached_property
    def _auxiliary_parts(self) -> tuple[list[Sample], list[Sample]]:
        """What of the auxiliary set is trained on, and what is held out for validation."""
        assert self.auxiliary is not None
        samples = self.auxiliary.samples("test")
        if self.val_split != "auxiliary":
            return samples, []
        held = hold_out([(s.category, s.label) for s in samples], self.val_share, self.seed)
        if not held:
            raise ValueError(
                f"data.val_split auxiliary: {len(samples)} images are too few to hold "
                f"{self.val_share:g} of them out"
            )
        trained = [sample for row, sample in enumerate(samples) if row not in held]
        return trained, [samples[row] for row in sorted(held)]

    @cached_property
    def _normal_parts(self) -> tuple[list[Sample], list[Sample]]:
        """What of the normal images is trained on, and what is held out for validation."""
        samples = [sample for sample in self.samples("train") if not sample.label]
        held = hold_out([s.category for s in samples], self.val_share, self.seed)
        if not held:
            raise ValueError(
                f"data.val_split synthetic: {len(samples)} normal images are too few to hold "
                f"{self.val_share:g} of each category out: raise data.val_share, or set "
                f"data.val_split none"
            )
        trained = [sample for row, sample in enumerate(samples) if row not in held]
        return trained, [samples[row] for row in sorted(held)]

    def summary(self, stage: str) -> str:
        """Say in a few words what a stage gets."""
        source = self if stage != "fit" or self.auxiliary is None else self.auxiliary
        samples = self.fit_samples() if stage == "fit" else self.samples("test")
        known = f"{sum(s.label for s in samples)} anomalous" if source.has_labels else "no labels"
        number = len({s.category for s in samples})
        return (
            f"{len(samples)} images ({known}) in {number} "
            f"{'category' if number == 1 else 'categories'}"
            f"{'' if source is self else f' of {source.dataset_name} {source.root}'}"
        )

    def protocol(self) -> Mapping[str, object]:
        """Return what figures depend on and belongs beside them."""
        auxiliary = self.auxiliary
        return {
            "data": self.dataset_name,
            "image_size": self.image_size,
            "mask_size": self.mask_size or self.image_size,
            "mask_filter": self.mask_filter,
            "mask_threshold": self.mask_threshold,
            "words": {name: self.words(name) for name in self.categories},
            "resize": str(self.resize),
            "train_categories": self.asked_train_categories,
            "auxiliary": None if auxiliary is None else auxiliary.dataset_name,
            "val_split": self.val_split,
            "val_share": self.val_share if self.val_split in ("synthetic", "auxiliary") else None,
            "synthesis": None if self.synthesis is None else asdict(self.synthesis),
            "shots": self.shots,
            "fraction": self.fraction,
            "data_seed": self.seed,
            "allow_overlap": self.allow_overlap,
        }

    def setup(self, stage: str) -> None:
        """Take the image size from the model and list what the stage needs.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If the image size is not the model's, a category is empty, or test images
                are among the training images.
        """
        wanted = getattr(self.trainer and self.trainer.lightning_module, "image_size", None)
        if wanted is not None and self.image_size not in (None, wanted):
            raise ValueError(
                f"data.image_size {self.image_size} is not what the model takes ({wanted}): leave "
                f"it out, or set the model's"
            )
        self.image_size = self.image_size or wanted
        self._in_fit.clear()
        if self.image_size is not None:
            self.resize.check(self.image_size)
        for name, few in (("shots", self.shots), ("fraction", self.fraction)):
            if few is not None and "train" not in self.splits:
                raise ValueError(
                    f"data.{name} {few}: {self.dataset_name} has no train images to draw from"
                )
        if self.auxiliary is not None:
            auxiliary = self.auxiliary
            if not auxiliary.has_labels or "test" not in auxiliary.splits:
                raise ValueError(
                    f"data.auxiliary {auxiliary.root}: nothing says which of its images are normal"
                )
            auxiliary.image_size = auxiliary.image_size or self.image_size
            if auxiliary.image_size != self.image_size:
                raise ValueError(
                    f"data.auxiliary.image_size {auxiliary.image_size} is not "
                    f"{self.image_size}: leave it out"
                )
        if stage == "fit":
            self._refuse_overlap(self.fit_samples())
            return
        if stage != "predict" and not self.has_labels:
            raise ValueError(
                f"data.root {self.root}: nothing says which images are normal, so there are no "
                f"figures: use predict, or put the normal ones into good/"
            )
        self.samples("test")

    def fit_dataset(self) -> SampleDataset | SyntheticDataset:
        """Return what ``fit`` learns from as tensors, the same object all through a fit."""
        if "train" not in self._in_fit:
            source = self if self.auxiliary is None else self.auxiliary
            if self.synthesis is None:
                self._in_fit["train"] = source._tensors(self.fit_samples())
            else:
                normal = source._tensors([s for s in self.fit_samples() if not s.label])
                self._in_fit["train"] = SyntheticDataset(normal, self.synthesis, self.seed)
        return self._in_fit["train"]  # type: ignore[return-value]

    def validation_dataset(self) -> SampleDataset | SyntheticTwins | None:
        """Return what validates as tensors, the same object all through a fit; None for nothing."""
        if "val" not in self._in_fit and self.val_split == "test":
            self._in_fit["val"] = self.dataset("test")
        elif "val" not in self._in_fit and self.val_split == "auxiliary":
            assert self.auxiliary is not None
            self._in_fit["val"] = self.auxiliary._tensors(self._auxiliary_parts[1])
        elif "val" not in self._in_fit and self.val_split == "synthetic":
            assert self.synthesis is not None
            held = self._tensors(self._normal_parts[1])
            donors = self._tensors([s for s in self.fit_samples() if not s.label])
            self._in_fit["val"] = SyntheticTwins(held, self.synthesis, self.seed, donors)
        return self._in_fit.get("val")  # type: ignore[return-value]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return what ``fit`` learns from, in an order drawn from (seed, epoch).

        A method that looks once at all images gets each of them once, on one process; one that
        compares images with others gets batches of one category, with ``support``.
        """
        source = self if self.auxiliary is None else self.auxiliary
        dataset = self.fit_dataset()
        samples = dataset.samples
        trainer = self.trainer
        if trainer is not None and getattr(trainer.lightning_module, "without_gradients", False):
            world = (trainer.world_size, trainer.global_rank)
            return DataLoader(
                Batches(dataset),
                batch_size=None,
                sampler=EvenBatches(len(dataset), self.batch_size, *world),
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
        world = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        support = getattr(getattr(trainer, "lightning_module", None), "support_images", 0)
        if support:
            return self._support_loader(support, world)
        groups = [s.category for s in samples] if source.balanced else None
        full = getattr(getattr(trainer, "lightning_module", None), "full_batches", False)
        sampler = EpochSampler(dataset, self.seed, *world, groups=groups, shuffle=source.shuffle)
        return EpochLoader(
            done=self._batches_done,
            dataset=dataset,
            batch_size=source.batch_size,
            drop_last=full and len(sampler) >= source.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _support_loader(self, count: int, world: tuple[int, int]) -> DataLoader[Batch]:
        """Return batches of one category; with each image come ``count`` others."""
        dataset = self.fit_dataset()
        assert isinstance(dataset, SampleDataset)
        rows = normal_rows(dataset)
        return EpochLoader(
            done=self._batches_done,
            dataset=SupportedBatches(dataset, rows, count, self.seed),
            batch_size=None,
            sampler=CategoryBatches(rows, self.batch_size, self.seed, *world, shuffle=self.shuffle),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _batches_done(self) -> int:
        """Return how many batches of the epoch a fit has behind it: none unless it was resumed."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)  # type: ignore[attr-defined]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return what validates."""
        dataset = self.validation_dataset()
        assert dataset is not None
        return self._evaluation_loader(dataset)

    def test_dataloader(self) -> Any:
        """Return the test split, in the order of its listing; a list for methods with passes."""
        module = getattr(self.trainer, "lightning_module", None)
        passes = getattr(module, "test_passes", 1)
        loaders = [self._evaluation_loader(self.dataset("test")) for _ in range(passes)]
        return loaders[0] if passes == 1 else loaders

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in the order of its listing."""
        return self._evaluation_loader(self.dataset("test"))

    def _evaluation_loader(self, dataset: SampleDataset | SyntheticTwins) -> DataLoader[Batch]:
        trainer = self.trainer
        sampler = None
        if trainer is not None and trainer.world_size > 1:
            if len(dataset) < trainer.world_size:
                raise ValueError(
                    f"{len(dataset)} images cannot be shared by {trainer.world_size} processes: "
                    f"lower trainer.devices or trainer.num_nodes"
                )
            # Never repeats an image to even out the ranks, as the ordinary one does.
            sampler = UnrepeatedDistributedSampler(
                dataset, trainer.world_size, trainer.global_rank, shuffle=False
            )
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # default collation makes a Batch of Items
            batch_size=self.batch_size,
            shuffle=False,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
