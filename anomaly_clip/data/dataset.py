"""The data module that all data sets share; a data set differs by a listing function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MethodType
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from anomaly_clip.data.auxiliary import check_auxiliary, share_image_size
from anomaly_clip.data.base import BaseDataModule
from anomaly_clip.data.feature_cache import FeatureCache
from anomaly_clip.data.few_shots import FewShots
from anomaly_clip.data.file_hashes import DuplicatePair
from anomaly_clip.data.image_cache import ImageCache
from anomaly_clip.data.listing import Listing, TrainCategories
from anomaly_clip.data.loaders import (
    evaluation_loader,
    processes,
    single_pass_loader,
    support_loader,
    training_loader,
)
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.data.samples import Item, Reader, Sample, SampleDataset, Split, read_sample
from anomaly_clip.data.synthetic import SyntheticDataset, SyntheticPairs
from anomaly_clip.data.transforms import MaskFilter, Resize
from anomaly_clip.data.validation import ValidationSplit, ValSplit
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.images import read_image, read_mask
from anomaly_clip.records import Batch, Encoder, LoaderNeeds, needs_of
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


class AnomalyData(BaseDataModule):
    """The data module of all data sets; a subclass finds categories and lists samples.

    Its parts: ``listing`` (categories and samples), ``few_shots`` (a limit on training images) and
    ``validation`` (what validates during fit).

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
        val_share: Fraction of the training images per category held out for validation, if
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
        train_categories: TrainCategories = "same",
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
        super().__init__()
        check_at_least("data.batch_size", batch_size, 1)
        check_at_least("data.seed", seed, 0)
        if balanced and not shuffle:
            raise ValueError("data.balanced true draws images, so data.shuffle must be true")
        for name, size in (("image_size", image_size), ("mask_size", mask_size)):
            if size is not None:
                check_at_least(f"data.{name}", size, 1)
        check_between("data.mask_threshold", mask_threshold, 0, 1, open_high=True)
        if image_size is not None:
            resize.check(image_size)
        try:
            self.root = Path(root).expanduser()
        except RuntimeError as error:  # there is no such user
            raise ValueError(f"data.root {root}: {error}") from None
        self.image_size = image_size
        self.resize = resize
        self.mask_size = mask_size
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.category_names = words or {}
        self.auxiliary: AnomalyData | None = auxiliary
        self.synthesis = synthesis
        self.seed = seed
        self.balanced = balanced
        self.shuffle = shuffle
        self.allow_overlap = allow_overlap
        self.cache = cache
        self.batch_size = batch_size
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.listing = Listing(self, categories, train_categories)
        self.few_shots = FewShots(self, shots, fraction)
        check_auxiliary(self)
        self.validation = ValidationSplit(self, val_split, val_share)
        if not self.validation.exists:
            # Lightning then sees no loader; an empty one makes it warn.
            self.val_dataloader = MethodType(LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]
        self._in_fit: dict[str, SampleDataset | SyntheticDataset | SyntheticPairs | None] = {}

    # -- what is listed --------------------------------------------------------------------------

    @property
    def categories(self) -> list[str]:
        """The categories in use, in their order.

        Raises:
            FileNotFoundError: If none is found.
            ValueError: If an asked one is not there, or is asked for twice.
        """
        return self.listing.categories

    @property
    def train_categories(self) -> list[str]:
        """The categories that ``fit`` learns from.

        Raises:
            FileNotFoundError: If none is found.
            ValueError: If an asked one is not there, is asked for twice, or none is left.
        """
        return self.listing.train_categories

    @property
    def val_split(self) -> ValSplit:
        """The kind of validation."""
        return self.validation.kind

    def validation_categories(self) -> list[str]:
        """Return the categories of what validates during ``fit``."""
        return self.validation.categories

    def samples(self, split: Split) -> list[Sample]:
        """Return the listing of a split, category after category; read once.

        Raises:
            FileNotFoundError: If a mask is missing.
            ValueError: If there is no such split, a category has no sample in it, or a mask has no
                image.
        """
        return self.listing.samples(split)

    def dataset(self, split: Split) -> SampleDataset:
        """Return a split as tensors, at the sizes in use.

        Raises:
            ValueError: If no image size is known yet.
        """
        return self.as_tensors(self.samples(split))

    def as_tensors(self, samples: Sequence[Sample]) -> SampleDataset:
        """Return samples as tensors, at the sizes in use; see :meth:`dataset`."""
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
            mask_rule=self.info.mask,
            read=None if self.on_disk else self.reader(),
            resize=self.resize,
            cache=ImageCache(str(self.info.mask)) if self.cache and self.on_disk else None,
        )

    def words(self, category: str) -> str:
        """Return the name in prompts of a category of this set or the auxiliary one."""
        names = {**self.info.words, **self.category_names}
        if category in names or self.auxiliary is None or category in self.categories:
            return names.get(category, category)
        return self.auxiliary.words(category)

    # -- what is trained on ----------------------------------------------------------------------

    @property
    def has_shots(self) -> bool:
        """Whether only some of the normal training images are used."""
        return self.few_shots.is_limited

    def fit_samples(self) -> list[Sample]:
        """Return what ``fit`` learns from: training images, or an auxiliary set's test split."""
        if self.auxiliary is not None:
            return self.validation.auxiliary_parts[0]
        if self.has_shots:
            return [s for category in self.train_categories for s in self.shots_of(category)]
        if self.validation.is_synthetic:
            return self.validation.normal_parts[0]
        return self.samples("train")

    def shots_of(self, category: str) -> list[Sample]:
        """Return a category's few normal training images, drawn by (seed, category).

        Raises:
            ValueError: If neither ``shots`` nor ``fraction`` is given, or there are fewer images.
        """
        return self.few_shots.of(category)

    def drawn_of(self, category: str, count: int, seed: int) -> list[Sample]:
        """Return as many normal training images of a category as a method asks for.

        Args:
            category: Whose images; it need not be trained on.
            count: How many.
            seed: Draws them, with the category's name.

        Raises:
            ValueError: If there are no training images, or fewer.
        """
        return self.few_shots.drawn(category, count, seed)

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
        dataset = self.as_tensors(chosen)
        return cast("Batch", default_collate([dataset[row] for row in range(len(chosen))]))

    def fit_dataset(self) -> SampleDataset | SyntheticDataset:
        """Return what ``fit`` learns from as tensors, the same object all through a fit."""
        if "train" not in self._in_fit:
            source = self if self.auxiliary is None else self.auxiliary
            if self.synthesis is None:
                self._in_fit["train"] = source.as_tensors(self.fit_samples())
            else:
                normal = source.as_tensors([s for s in self.fit_samples() if not s.label])
                self._in_fit["train"] = SyntheticDataset(normal, self.synthesis, self.seed)
        return self._in_fit["train"]  # type: ignore[return-value]

    def validation_dataset(self) -> SampleDataset | SyntheticPairs | None:
        """Return what validates as tensors, the same object all through a fit; None for nothing."""
        if "val" not in self._in_fit:
            self._in_fit["val"] = self.validation.dataset()
        return self._in_fit["val"]  # type: ignore[return-value]

    def unchanging_datasets(self) -> dict[str, SampleDataset]:
        """Return what ``fit`` and ``validation`` show, as far as it is the same in every epoch."""
        datasets = {"fit": self.fit_dataset(), "validation": self.validation_dataset()}
        return {name: part for name, part in datasets.items() if isinstance(part, SampleDataset)}

    def cache_features(self, encoders: Mapping[str, Encoder], limit_gb: float, option: str) -> None:
        """Encode unchanging images once, on disk; batches then hold features in their place.

        Args:
            encoders: Of ``fit`` and ``validation``.
            limit_gb: Size in GB (1e9 bytes) that the cache may have.
            option: Name of the limit in messages.

        Raises:
            OSError: If features cannot be written.
            ValueError: If they would take more room than there is.
        """
        assert self.trainer is not None
        agree = self.trainer.strategy.reduce_boolean_decision
        cache = FeatureCache(limit_gb, option, processes=processes(self.trainer), agree=agree)
        for name, dataset in self.unchanging_datasets().items():
            dataset.features = cache.fill(
                dataset, encoders[name], self.batch_size, self.num_workers
            )

    # -- images that are trained on and tested ---------------------------------------------------

    def overlap(self, samples: Sequence[Sample] | None = None) -> list[DuplicatePair]:
        """Return the test images that are among the training images, by content.

        Args:
            samples: The training images; default: what ``fit`` learns from.
        """
        if "test" not in self.splits:
            return []
        trained = self.fit_samples() if samples is None else samples
        return self.duplicates(trained, self.samples("test"))

    def _refuse_overlap(self, samples: Sequence[Sample]) -> None:
        pairs = [] if self.allow_overlap else self.overlap(samples)
        if pairs:
            raise ValueError(
                f"{len(pairs)} test images are among the training images, such as "
                f"{pairs[0].second} = {pairs[0].first}: remove them, or allow it with "
                f"data.allow_overlap true"
            )

    # -- what a run records ----------------------------------------------------------------------

    def summary(self, stage: str) -> str:
        """Return the number of images, labels and categories of a stage, in words."""
        source = self if stage != "fit" or self.auxiliary is None else self.auxiliary
        samples = self.fit_samples() if stage == "fit" else self.samples("test")
        labels = f"{sum(s.label for s in samples)} anomalous" if source.has_labels else "no labels"
        number = len({s.category for s in samples})
        return (
            f"{len(samples)} images ({labels}) in {number} "
            f"{'category' if number == 1 else 'categories'}"
            f"{'' if source is self else f' of {source.dataset_name} {source.root}'}"
        )

    def protocol(self) -> Mapping[str, object]:
        """Return the settings of the data to record with the metrics."""
        auxiliary = self.auxiliary
        return {
            "data": self.dataset_name,
            "image_size": self.image_size,
            "mask_size": self.mask_size or self.image_size,
            "mask_filter": self.mask_filter,
            "mask_threshold": self.mask_threshold,
            "words": {name: self.words(name) for name in self.categories},
            "resize": str(self.resize),
            "train_categories": self.listing.chosen_for_training,
            "auxiliary": None if auxiliary is None else auxiliary.dataset_name,
            "val_split": self.validation.kind,
            "val_share": self.validation.share if self.validation.holds_out else None,
            "synthesis": None if self.synthesis is None else asdict(self.synthesis),
            "shots": self.few_shots.shots,
            "fraction": self.few_shots.fraction,
            "data_seed": self.seed,
            "allow_overlap": self.allow_overlap,
        }

    # -- Lightning's hooks -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the image size from the model and list what the stage needs.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If the image size is not the model's, a category is empty, or test images
                are among the training images.
        """
        self._take_image_size(self._needs.image_size)
        self._in_fit.clear()
        self.few_shots.check()
        if stage == "fit":
            self._refuse_overlap(self.fit_samples())
            return
        if stage != "predict" and not self.has_labels:
            raise ValueError(
                f"data.root {self.root}: nothing says which images are normal, so there are no "
                f"figures: use predict, or put the normal ones into good/"
            )
        self.samples("test")

    def _take_image_size(self, needed: int | None) -> None:
        if needed is not None and self.image_size not in (None, needed):
            raise ValueError(
                f"data.image_size {self.image_size} is not what the model takes ({needed}): leave "
                f"it out, or set the model's"
            )
        self.image_size = self.image_size or needed
        if self.image_size is not None:
            self.resize.check(self.image_size)
        share_image_size(self)

    @property
    def _needs(self) -> LoaderNeeds:
        return needs_of(self.trainer)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return what ``fit`` learns from, in an order drawn from (seed, epoch).

        A method that looks once at all images gets each of them once, on one process; one that
        compares images with others gets batches of one category, with ``support``.
        """
        dataset, needs, trainer = self.fit_dataset(), self._needs, self.trainer
        if needs.single_pass:
            assert trainer is not None
            return single_pass_loader(dataset, self.batch_size, self.num_workers, trainer)
        if needs.support_images:
            assert isinstance(dataset, SampleDataset)
            return support_loader(
                dataset,
                needs.support_images,
                self.seed,
                self.shuffle,
                self.batch_size,
                self.num_workers,
                trainer,
            )
        source = self if self.auxiliary is None else self.auxiliary
        groups = [s.category for s in dataset.samples] if source.balanced else None
        sampler = EpochSampler(
            dataset, self.seed, *processes(trainer), groups=groups, shuffle=source.shuffle
        )
        return training_loader(
            dataset, sampler, source.batch_size, self.num_workers, trainer, needs.full_batches
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return what validates."""
        dataset = self.validation_dataset()
        assert dataset is not None
        return self._evaluation_loader(dataset)

    def test_dataloader(self) -> Any:
        """Return the test split, in the order of its listing; a list for methods with passes."""
        passes = self._needs.test_passes
        loaders = [self._evaluation_loader(self.dataset("test")) for _ in range(passes)]
        return loaders[0] if passes == 1 else loaders

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in the order of its listing."""
        return self._evaluation_loader(self.dataset("test"))

    def _evaluation_loader(self, dataset: SampleDataset | SyntheticPairs) -> DataLoader[Batch]:
        return evaluation_loader(dataset, self.batch_size, self.num_workers, self.trainer)
