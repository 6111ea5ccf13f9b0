"""What all data sets share: the sample, the torch data set and the data module.

A data set differs from another by a listing function; the rest is here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomaly_clip.data.transforms import (
    MaskFilter,
    is_image,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from anomaly_clip.records import Batch

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # in typing since Python 3.11

__all__ = [
    "AnomalyData",
    "Item",
    "Reader",
    "Sample",
    "SampleDataset",
    "Split",
    "read_image",
    "read_mask",
    "read_sample",
]

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a listing.

    Args:
        image: Where the image is.
        category: What is shown; its words go into the prompts.
        label: Whether it is anomalous.
        mask: Where the mask is; None for a normal image and in data sets without pixel labels.
        defect: The kind of defect, ``good`` for none.
    """

    image: Path
    category: str
    label: bool
    mask: Path | None = None
    defect: str = "good"


Reader = Callable[[Sample], tuple[NDArray[np.uint8], NDArray[np.bool_] | None]]
"""Returns a sample's image and mask at their own size."""


class Item(TypedDict):
    """One row of a :class:`~anomaly_clip.records.Batch`, before batching."""

    image: Tensor
    label: bool
    category: str
    path: str
    index: int
    mask: NotRequired[Tensor]


def read_sample(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Return a sample's image and mask at their own size.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be decoded, or image and mask differ in size.
    """
    image = read_image(sample.image)
    if sample.mask is None:
        return image, None
    mask = read_mask(sample.mask)
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"{sample.mask}: the mask is {_size(mask)} pixels, its image {sample.image.name} "
            f"is {_size(image)}"
        )
    return image, mask


class SampleDataset(Dataset[Item]):
    """Samples as tensors.

    Args:
        samples: The listing; a sample's row in it is its index.
        image_size: Side of the square images, in pixels.
        mask_size: Side of the square masks, in pixels.
        has_masks: Whether the data set has pixel labels; normal images then get empty masks.
        mask_filter: How masks are resized.
        mask_threshold: Above which filtered value a mask's pixel is True.
        read: Returns a sample's image and mask at their own size; default: from their files.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        mask_size: int,
        *,
        has_masks: bool = True,
        mask_filter: MaskFilter = "bilinear",
        mask_threshold: float = 0.5,
        read: Reader = read_sample,
    ) -> None:
        self.samples = samples
        self.image_size = image_size
        self.mask_size = mask_size
        self.has_masks = has_masks
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        image, mask = self.read(sample)
        resized = resize_image(image, self.image_size)
        item = Item(
            # A copy: decoded arrays are read-only, and torch wants to own what it collates.
            image=torch.from_numpy(resized.copy()).permute(2, 0, 1).contiguous(),
            label=sample.label,
            category=sample.category,
            path=str(sample.image),
            index=index,
        )
        if self.has_masks:
            item["mask"] = torch.from_numpy(self._square_mask(mask))
        return item

    def _square_mask(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        if mask is None:
            return np.zeros((self.mask_size, self.mask_size), dtype=bool)
        return resize_mask(mask, self.mask_size, self.mask_filter, self.mask_threshold)


class AnomalyData(LightningDataModule, ABC):
    """The data module of all data sets; a subclass says what is listed where.

    Args:
        root: The data set's folder.
        categories: Which categories to use, in this order; default: all that are found, sorted.
        train_categories: Which categories ``fit`` learns from: same, or others (all that are found
            but ``categories``), or a list.
        image_size: Side of the square images; default: what the model takes.
        mask_size: Side of masks and anomaly maps; default: the image size.
        mask_filter: How masks are resized.
        mask_threshold: Above which filtered value (0 to 1) a mask's pixel counts as anomalous.
        batch_size: Images of a batch.
        num_workers: Processes that load images; default: one a core, at most 4.
    """

    dataset_name: ClassVar[str]
    """Which data set this is; methods look up published settings by it."""

    def __init__(
        self,
        root: str,
        categories: list[str] | None = None,
        train_categories: Literal["same", "others"] | list[str] = "same",
        image_size: int | None = None,
        mask_size: int | None = None,
        mask_filter: MaskFilter = "bilinear",
        mask_threshold: float = 0.5,
        batch_size: int = 16,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("image_size", image_size), ("mask_size", mask_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.{name} must be positive, got {size}")
        if not 0 <= mask_threshold < 1:
            raise ValueError(f"data.mask_threshold must be in [0, 1), got {mask_threshold}")
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be positive, got {batch_size}")
        self.root = Path(root).expanduser()
        self.asked_categories = categories
        self.asked_train_categories = train_categories
        self.image_size = image_size
        self.mask_size = mask_size
        self.mask_filter = mask_filter
        self.mask_threshold = mask_threshold
        self.batch_size = batch_size
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self._listings: dict[Split, list[Sample]] = {}

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
        """Yield the samples of a category, sorted."""

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
                "data.train_categories others: none is left, as data.categories are all there are"
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
            ValueError: If a category has no sample in it.
        """
        if split not in self._listings:
            listing: list[Sample] = []
            for category in self.train_categories if split == "train" else self.categories:
                rows = list(self.list_samples(category, split))
                if not rows:
                    raise ValueError(f"{self.root}: category {category!r} has no {split} images")
                listing += rows
            self._listings[split] = listing
        return self._listings[split]

    def dataset(self, split: Split) -> SampleDataset:
        """Return a split as tensors, at the sizes in use.

        Raises:
            ValueError: If no image size is known yet.
        """
        if self.image_size is None:
            raise ValueError(
                "data.image_size is not known: give it, or let a trainer set up the data with a "
                "model"
            )
        return SampleDataset(
            self.samples(split),
            self.image_size,
            self.mask_size or self.image_size,
            has_masks=self.has_masks,
            mask_filter=self.mask_filter,
            mask_threshold=self.mask_threshold,
            read=self.reader(),
        )

    def reader(self) -> Reader:
        """Return what reads a sample's image and mask; it travels to the loading processes."""
        return read_sample

    def summary(self, stage: str) -> str:
        """Say in a few words what a stage gets."""
        samples = self.samples("test")
        known = f"{sum(s.label for s in samples)} anomalous" if self.has_labels else "no labels"
        number = len(self.categories)
        return (
            f"{len(samples)} images ({known}) in {number} "
            f"{'category' if number == 1 else 'categories'}"
        )

    def setup(self, stage: str) -> None:
        """Take the image size from the model and list what the stage needs.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If the image size is not the model's, or a category is empty.
        """
        wanted = getattr(self.trainer and self.trainer.lightning_module, "image_size", None)
        if wanted is not None and self.image_size not in (None, wanted):
            raise ValueError(
                f"data.image_size {self.image_size} is not what the model takes ({wanted}): leave "
                f"it out, or set the model's"
            )
        self.image_size = self.image_size or wanted
        if stage != "predict" and not self.has_labels:
            raise ValueError(
                f"data.root {self.root}: nothing says which images are normal, so there are no "
                f"figures: use predict, or put the normal ones into good/"
            )
        self.samples("test")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in the order of its listing."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test split, in the order of its listing."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> DataLoader[Batch]:
        dataset = self.dataset(split)
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


def images_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if is_image(p))


def paired_masks(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the mask of each image: ``NAME_mask.*``, or ``NAME.*``, in a folder. By name only.

    Raises:
        FileNotFoundError: If an image has no mask.
        ValueError: If a mask has no image.
    """
    by_stem = {p.stem: p for p in images_in(folder)}
    masks = {}
    for image in images:
        mask = by_stem.get(f"{image.stem}_mask") or by_stem.get(image.stem)
        if mask is None:
            expected = folder / f"{image.stem}_mask.png"
            raise FileNotFoundError(f"{image}: its mask is missing, expected {expected}")
        masks[image] = mask
    spare = sorted(set(by_stem.values()) - set(masks.values()))
    if spare:
        raise ValueError(f"{spare[0]}: a mask without an image")
    return masks


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def missing_layout(root: Path, expected: str) -> FileNotFoundError:
    """Return the error for a folder that is not laid out as expected, saying what is there."""
    if not root.exists():
        return FileNotFoundError(f"data.root {root}: there is no such folder; expected {expected}")
    if not root.is_dir():
        return FileNotFoundError(f"data.root {root} is a file; expected a folder with {expected}")
    names = sorted(p.name for p in root.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    return FileNotFoundError(f"data.root {root}: expected {expected}; there is {shown}")


def _size(array: NDArray[np.generic]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
