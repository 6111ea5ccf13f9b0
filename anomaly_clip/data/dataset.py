"""The data module shared by all data sets, which differ in how their samples are listed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, default_collate

from anomaly_clip.data.augment import Augmentation
from anomaly_clip.data.auxiliary import check_auxiliary, check_shots, take_image_size
from anomaly_clip.data.base import BaseDataModule
from anomaly_clip.data.calibration_images import CalibrationImages
from anomaly_clip.data.few_shots import FewShots
from anomaly_clip.data.file_hashes import DuplicatePair
from anomaly_clip.data.fit_sets import FitSets
from anomaly_clip.data.image_cache import ImageCache
from anomaly_clip.data.info import MaskRule, is_own
from anomaly_clip.data.leakage import LeakageCheck
from anomaly_clip.data.listing import Listing, TrainCategories
from anomaly_clip.data.loaders import evaluation_loader, fit_loader
from anomaly_clip.data.mask_checks import MaskChecks
from anomaly_clip.data.mask_files import OWN_MISFIT, OWN_MISFIT_SHARE
from anomaly_clip.data.protocol import data_protocol
from anomaly_clip.data.reading import BitDepth, ImageReading, Unreadable
from anomaly_clip.data.reading_errors import PredictionImages
from anomaly_clip.data.samples import Item, Reader, Sample, SampleDataset, Split, read_sample
from anomaly_clip.data.stitching import check_stitching
from anomaly_clip.data.summary import start_line
from anomaly_clip.data.synthetic import SyntheticDataset, SyntheticPairs
from anomaly_clip.data.transforms import MaskFilter, Resize
from anomaly_clip.data.unreadable import UnreadableFiles
from anomaly_clip.data.validation import ValidationSplit, ValSplit
from anomaly_clip.errors import check_at_least, check_between
from anomaly_clip.images import MAX_PIXELS, read_image
from anomaly_clip.masks import read_mask
from anomaly_clip.records import EVALUATED, Batch, Encoder, LoaderNeeds, needs_of
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
    """Base of all data modules; a subclass finds the categories and lists the samples.

    A data module has the attributes ``listing`` (categories and samples), ``few_shots`` (a limit on
    the number of training images) and ``validation`` (the validation images of ``fit``).

    Args:
        root: The data set's folder.
        categories: Categories to use, in this order; default: all, sorted.
        train_categories: Categories that ``fit`` trains on: same, others (all categories except
            ``categories``), or a list.
        image_size: Side of the square images in pixels; default: the model's.
        resize: How images are made square.
        mask_size: Side in pixels at which masks and maps are compared; default: the image size.
        mask_filter: Filter that resizes masks.
        mask_threshold: A pixel of a resized mask is anomalous if its value (0 to 1) is above this
            threshold.
        words: Name of each category in prompts; default: the data set's name for it, or else the
            category itself.
        auxiliary: Another data set. ``fit`` trains on its labelled test split and uses the
            batch_size, balanced and shuffle of that data set.
        val_split: Validation images of ``fit``: none; synthetic (held-out normal training images,
            each without and with a defect of ``synthesis``; with synthesis.share 0, the training
            images have no defects); auxiliary (held-out images of the auxiliary set); test (model
            selection then uses the test images, and the results record this).
        val_share: Fraction of each category's training images that is held out for validation, if
            val_split is synthetic or auxiliary.
        synthesis: Settings of synthetic defects in training images; default: no defects.
        shots: Number of normal images per category, sampled at random with ``seed``, to train on or
            to compare with as references; smaller samples are subsets of larger ones; default: all.
        fraction: Alternative to shots: fraction of each category's normal training images, at
            least one image; default: all.
        seed: Seed of the few-shot samples, held-out images, synthetic defects and training order.
        balanced: Whether training samples all categories equally often.
        shuffle: Whether to shuffle training images each epoch; otherwise they keep the order of
            the listing.
        allow_overlap: Whether training images may have the same content as test images.
        cache: Whether to keep decoded and resized images on disk, in the cache folder.
        batch_size: Images per batch.
        num_workers: Number of data loader workers; default: one per core, at most 4.
        augment: Random transforms of training images and their masks, applied after resizing: a
            list of albumentations transforms by class path and arguments; default: none.
        bit_depth: Significant bits of images with 16 bits per channel, such as 12 for a 12-bit
            camera; auto: the checkpoint's, or else chosen from all images of the fit or the test.
        max_pixels: Largest number of pixels of an image; reading takes about 12 bytes each.
        unreadable: What fit and test do with images that cannot be decoded: error, or skip.
        mask_level: Grey level (0 to 254) above which a mask's pixel is anomalous; default: the data
            set's rule, which is 0 for most.
        stitch: Probability that a training image of an auxiliary data set is replaced by 2 x 2
            images of its category, as APRIL-GAN does with MVTec-AD (0.2). Image features are then
            not cached, because the images of each epoch differ.
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
        augment: list[dict] | None = None,
        bit_depth: BitDepth = "auto",
        max_pixels: int = MAX_PIXELS,
        unreadable: Unreadable = "error",
        mask_level: int | None = None,
        stitch: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least("data.batch_size", batch_size, 1)
        check_at_least("data.seed", seed, 0)
        if balanced and not shuffle:
            raise ValueError(
                f"data.balanced {balanced} needs a random order: set data.shuffle {shuffle} to true"
            )
        for name, size in (("image_size", image_size), ("mask_size", mask_size)):
            if size is not None:
                check_at_least(f"data.{name}", size, 1)
        check_between("data.mask_threshold", mask_threshold, 0, 1, open_high=True)
        check_between("data.stitch", stitch, 0, 1)
        if mask_level is not None:
            check_between("data.mask_level", mask_level, 0, 254)
        if image_size is not None:
            resize.check(image_size)
        if not root.strip():
            raise ValueError(f"data.root {root!r} is empty: give the data set's folder")
        try:
            self.root = Path(root).expanduser()
        except RuntimeError as error:  # ~name of an unknown user
            raise ValueError(f"data.root {root}: give the full path ({error})") from None
        self.image_size = image_size
        self.resize = resize
        self.mask_size = mask_size
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.mask_level = mask_level
        for name in words or {}:
            if not isinstance(name, str):  # such as the key 01 in a file
                raise ValueError(f'data.words: {name} is no text: put it in quotes, such as "01"')
        self.category_names = words or {}
        self.auxiliary: AnomalyData | None = auxiliary
        self.synthesis = synthesis
        self.stitch = stitch
        self.seed = seed
        self.balanced = balanced
        self.shuffle = shuffle
        self.allow_overlap = allow_overlap
        self.cache = cache
        self.batch_size = batch_size
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.augmentation = Augmentation(augment, seed) if augment else None
        self.fit_sets = FitSets(self, self.augmentation)
        self.leakage = LeakageCheck(self, allow_overlap)
        self.reading = ImageReading(self, bit_depth, max_pixels, unreadable)
        self.unreadable = UnreadableFiles(self)
        self.listing = Listing(self, categories, train_categories)
        self.masks = MaskChecks(self)
        self.few_shots = FewShots(self, shots, fraction)
        self.calibration = CalibrationImages(self)
        check_auxiliary(self)
        self.validation = ValidationSplit(self, val_split, val_share)
        if not self.validation.exists:
            # Lightning then finds no validation loader; it would warn about an empty one.
            self.val_dataloader = MethodType(LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]

    # -- categories and samples ------------------------------------------------------------------

    @property
    def categories(self) -> list[str]:
        """The categories in use, in order.

        Raises:
            FileNotFoundError: If the data set has no categories.
            ValueError: If a requested category is missing, or is requested twice.
        """
        return self.listing.categories

    @property
    def train_categories(self) -> list[str]:
        """The categories that ``fit`` trains on.

        Raises:
            FileNotFoundError: If the data set has no categories.
            ValueError: If a requested category is missing or requested twice, or if no category is
                left.
        """
        return self.listing.train_categories

    @property
    def val_split(self) -> ValSplit:
        """The kind of validation images."""
        return self.validation.kind

    def validation_categories(self) -> list[str]:
        """Return the categories of the validation images of ``fit``."""
        return self.validation.categories

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of a split, category after category; later calls list no files again.

        Raises:
            FileNotFoundError: If an image or a mask is missing.
            ValueError: If there is no such split, a category has no sample in it, or a mask has no
                image.
        """
        self.check_root()
        return self.listing.samples(split)

    def dataset(self, split: Split) -> SampleDataset:
        """Return a split as tensors, at the configured sizes.

        Raises:
            ValueError: If the image size is not set yet.
        """
        return self.as_tensors(self.samples(split))

    def as_tensors(self, samples: Sequence[Sample]) -> SampleDataset:
        """Return samples as tensors, at the configured sizes; see :meth:`dataset`."""
        if self.image_size is None:
            raise ValueError(
                f"data.image_size is {self.image_size}: set it, or let a trainer set up the data "
                f"with a model"
            )
        # The arrays do not depend on these two settings.
        tag = str(self.mask_rule._replace(lenient=False, max_pixels=0))
        return SampleDataset(
            samples,
            self.image_size,
            self.mask_size or self.image_size,
            has_masks=self.has_masks,
            guard=self.unreadable.guard,
            mask_filter=self.mask_filter,
            mask_threshold=self.mask_threshold,
            mask_rule=self.mask_rule,
            reading=self.reading.rule,
            read=None if self.on_disk else self.reader(),
            resize=self.resize,
            cache=ImageCache(tag) if self.cache and self.on_disk else None,
        )

    def words(self, category: str) -> str:
        """Return the prompt name of a category of this data set or of the auxiliary data set."""
        names = {**self.info.words, **self.category_names}
        if category in names or self.auxiliary is None or category in self.categories:
            return names.get(category, category)
        return self.auxiliary.words(category)

    @property
    def is_own(self) -> bool:
        """True if the images are a user's own: of no published data set, or category."""
        return is_own(self.dataset_name, self.find_categories)

    @property
    def mask_rule(self) -> MaskRule:
        """Rule for reading mask files: the data set's, with the user's settings."""
        rule = self.info.mask
        if self.is_own:
            rule = rule._replace(fitted=OWN_MISFIT, fitted_share=OWN_MISFIT_SHARE)
        if self.mask_level is not None:
            rule = rule._replace(grey=False, level=self.mask_level)
        lenient, max_pixels = not self.listing.needs_masks, self.reading.max_pixels
        return rule._replace(lenient=lenient, max_pixels=max_pixels)

    # -- training and validation images ----------------------------------------------------------

    @property
    def has_shots(self) -> bool:
        """True if only some of the normal training images are used."""
        return self.few_shots.is_limited

    def fit_samples(self) -> list[Sample]:
        """Return the samples ``fit`` trains on: training images, or the auxiliary test split.

        With ``shuffle``, they have the order from which random choices are made, otherwise that of
        the listing.
        """
        source: AnomalyData = self if self.auxiliary is None else self.auxiliary
        if self.auxiliary is not None:
            samples = self.validation.auxiliary_parts[0]
        elif self.has_shots:
            samples = [s for category in self.train_categories for s in self.shots_of(category)]
        elif self.validation.is_synthetic:
            samples = self.validation.normal_parts[0]
        else:
            samples = self.samples("train")
        return source.in_draw_order(samples) if source.shuffle else samples

    def normal_images(self, category: str) -> list[Sample]:
        """Return all normal images of a category that a fit might train on.

        Raises:
            ValueError: If there is none.
        """
        return self.calibration.normal(category)

    def shots_of(self, category: str) -> list[Sample]:
        """Return a category's few-shot training images; see :meth:`.FewShots.of`."""
        return self.few_shots.of(category)

    def drawn_of(self, category: str, count: int, seed: int) -> list[Sample]:
        """Sample ``count`` normal training images of a category with the seed (seed, category).

        Args:
            category: The category, which may be one that is not trained on.
            count: Number of images.
            seed: Seed of the random choice, combined with the category's name.

        Raises:
            ValueError: If the data set has no training images, or the category has fewer than
                ``count``.
        """
        return self.few_shots.drawn(category, count, seed)

    def references(self, category: str, count: int | None = None, seed: int = 0) -> Batch:
        """Return the normal reference images of a category.

        Args:
            category: The category.
            count: Number of images; default: the images that ``data.shots`` or ``data.fraction``
                selects with ``data.seed``.
            seed: Seed of the random choice if ``count`` is given.

        Returns:
            A batch: ``image`` uint8 ``(k, 3, H, W)``, ``path`` and the other keys.

        Raises:
            ValueError: As in :meth:`shots_of` or :meth:`drawn_of`, or if a reference image is also
                a test image.
        """
        chosen = self.shots_of(category) if count is None else self.drawn_of(category, count, seed)
        self.leakage.check_training(chosen, are_references=True)
        dataset = self.as_tensors(chosen)
        return cast("Batch", default_collate([dataset[row] for row in range(len(chosen))]))

    def fit_dataset(self) -> SampleDataset | SyntheticDataset:
        """Return the training samples as tensors; the same object throughout a fit."""
        return self.fit_sets.training()

    def validation_dataset(self) -> SampleDataset | SyntheticPairs | None:
        """Return the validation samples as tensors, or None; the same object throughout a fit."""
        return self.fit_sets.validation()

    def unchanging_datasets(self) -> dict[str, SampleDataset]:
        """Return the ``fit`` and ``validation`` sets, if their images are the same every epoch."""
        return self.fit_sets.unchanging()

    def cache_features(
        self, encoders: Mapping[str, Encoder], limit_gb: float, option: str
    ) -> frozenset[str]:
        """Store the features of unchanging images on disk, to be used in batches instead of images.

        A batch whose features cannot be stored or read has images, see :meth:`.Encoder.halves`.

        Args:
            encoders: The encoders of ``fit`` and ``validation``.
            limit_gb: Maximum size of the cache in GB (1e9 bytes).
            option: Name of the option that sets the limit, for messages.

        Returns:
            The sets whose features are cached: ``fit``, ``validation``, or both.

        Raises:
            ValueError: If the features would exceed the limit.
        """
        return self.fit_sets.cache_features(encoders, limit_gb, option)

    def begin_fit(self) -> None:
        """List the images of a fit from now on; for data sets whose splits depend on the stage."""

    # -- overlap of training and test images -----------------------------------------------------

    def overlap(self, samples: Sequence[Sample] | None = None) -> list[DuplicatePair]:
        """Return the test images with the content of training images; default: those of fit."""
        return self.leakage.overlap(samples)

    # -- records of a run ------------------------------------------------------------------------

    def summary(self, stage: str) -> str:
        """Describe the images of a stage in one line, and what of them is not used."""
        return start_line(self, stage)

    def protocol(self) -> Mapping[str, object]:
        """Return the data settings to record with the metrics."""
        return data_protocol(self)

    # -- Lightning's hooks -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the image size from the model and list the samples of the stage.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If the image size differs from the model's, a category is empty, labels are
                missing, or test images are among the training images.
        """
        self.unreadable.begin(stage, self.needs.bit_depth)
        take_image_size(self, self.needs.image_size)
        self.fit_sets.clear()
        self.few_shots.check()
        check_shots(self)
        check_stitching(self)
        self.listing.needs_masks = self.masks.are_used(stage)
        if stage == "fit":
            self.leakage.check_training(self.fit_samples())
        elif stage != "predict" and not self.has_labels:
            raise ValueError(
                f"data.root {self.root} has no labels to compute metrics with: use predict, or "
                f"put the normal images into good/"
            )
        else:
            self.leakage.check_test(stage, self.samples("test"), self.needs)
        self.masks.inspect(stage)
        self.reading.prepare_stage(stage, self.needs.bit_depth)

    def fitted_hashes(self) -> frozenset[str]:
        """Return hashes of the decoded images of ``fit``; empty for images that are not files."""
        return self.leakage.training_hashes()

    @property
    def needs(self) -> LoaderNeeds:
        """Requirements of the trainer's module."""
        return needs_of(self.trainer)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches, in an order that depends on (seed, epoch).

        A single-pass method gets each image exactly once, on one of the processes. A method that
        compares images with others gets batches of a single category, with ``support`` images.
        """
        return fit_loader(self, self.fit_dataset(), self.needs)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        dataset = self.validation_dataset()
        assert dataset is not None
        return self._evaluation_loader(dataset)

    def test_dataloader(self) -> Any:
        """Return the test split in the order of its listing.

        If the method needs several passes, return a list with one loader per pass.
        """
        passes = self.needs.test_passes
        loaders = [self._evaluation_loader(self.dataset("test")) for _ in range(passes)]
        return loaders[0] if passes == 1 else loaders

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in the order of its listing; its images may be unreadable."""
        return self._evaluation_loader(PredictionImages(self.dataset("test")))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Move a batch to the device; what a test compares scores with stays on the CPU."""
        trainer = self.trainer
        stays: frozenset[str] = frozenset()
        if trainer is not None and not trainer.training:
            is_detector = getattr(trainer.lightning_module, "is_detector", False)
            stays = EVALUATED if is_detector and isinstance(batch, dict) else stays
        if not stays:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        moved = {name: value for name, value in batch.items() if name not in stays}
        moved = super().transfer_batch_to_device(moved, device, dataloader_idx)
        return {name: moved.get(name, value) for name, value in batch.items()}

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Batch]:
        return evaluation_loader(dataset, self.batch_size, self.num_workers, self.trainer)
