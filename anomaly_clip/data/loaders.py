"""Data loaders for training and evaluation, on one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset

from anomaly_clip.data.reading_errors import PredictionImages
from anomaly_clip.data.samplers import (
    BatchedDataset,
    CategoryBatches,
    EpochSampler,
    EvenBatches,
    SupportedBatches,
    normal_rows,
)
from anomaly_clip.data.samples import SampleDataset

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.synthetic import SyntheticDataset
    from anomaly_clip.records import Batch, LoaderNeeds

__all__ = [
    "EpochLoader",
    "evaluation_loader",
    "fit_loader",
    "processes",
    "single_pass_loader",
    "support_loader",
    "training_loader",
]


# Data loaders fork their workers, and OpenCV's threads do not survive a fork: a worker that used
# these threads would hang.
cv2.setNumThreads(0)


class EpochLoader(DataLoader[Any]):
    """Data loader that starts to load an epoch only when its first batch is requested.

    Lightning creates the iterator of the first epoch before it restores a checkpoint's epoch and
    position, so workers that load ahead would start with the wrong samples. A resumed fit continues
    after the batches that it has already seen.

    Args:
        trainer: Trainer that counts the batches of the epoch that have been seen; None if no batch
            has been seen.
        num_workers: Number of data loader workers.
        options: Arguments of :class:`torch.utils.data.DataLoader`. The sampler is an
            :class:`~anomaly_clip.data.samplers.EpochSampler` or, without a batch_size, a
            :class:`~anomaly_clip.data.samplers.CategoryBatches`.
    """

    def __init__(self, trainer: Trainer | None, num_workers: int, **options: Any) -> None:
        super().__init__(
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, (EpochSampler, CategoryBatches))
        self.sampler.skip = self._batches_seen() * (self.batch_size or 1)
        yield from super().__iter__()

    def _batches_seen(self) -> int:
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the trainer's own epoch and position are enough to resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state; see :meth:`state_dict`."""


def processes(trainer: Trainer | None) -> tuple[int, int]:
    """Return the number of processes and the rank of this one; ``(1, 0)`` without a trainer."""
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)


def fit_loader(
    data: AnomalyData, dataset: SampleDataset | SyntheticDataset, needs: LoaderNeeds
) -> DataLoader[Batch]:
    """Return the training batches of a method; see :meth:`AnomalyData.train_dataloader`.

    Args:
        data: The data module.
        dataset: Its training images.
        needs: The requirements of the method.
    """
    trainer = data.trainer
    if needs.single_pass:
        assert trainer is not None
        return single_pass_loader(dataset, data.batch_size, data.num_workers, trainer)
    if needs.support_images:
        assert isinstance(dataset, SampleDataset)
        return support_loader(
            dataset,
            needs.support_images,
            data.seed,
            data.shuffle,
            data.batch_size,
            data.num_workers,
            trainer,
        )
    source = data if data.auxiliary is None else data.auxiliary
    groups = [s.category for s in dataset.samples] if source.balanced else None
    sampler = EpochSampler(
        dataset, data.seed, *processes(trainer), groups=groups, shuffle=source.shuffle
    )
    return training_loader(
        dataset, sampler, source.batch_size, data.num_workers, trainer, needs.full_batches
    )


def training_loader(
    dataset: Dataset[Any],
    sampler: EpochSampler,
    batch_size: int,
    num_workers: int,
    trainer: Trainer | None,
    full_batches: bool = False,
) -> DataLoader[Batch]:
    """Return the training batches of an epoch.

    Args:
        dataset: The training images.
        sampler: Order of the training images.
        batch_size: Images per batch.
        num_workers: Number of data loader workers.
        trainer: The trainer, if any.
        full_batches: Whether to drop an incomplete last batch, unless it is the only batch.

    Raises:
        ValueError: If ``full_batches`` is set, and each process gets a single image.
    """
    if full_batches and len(sampler) < 2:
        raise ValueError(
            f"BatchNorm needs several images in a batch, got {len(sampler.dataset)} training "  # type: ignore[arg-type]
            f"images for {sampler.num_replicas} processes: add images, or lower trainer.devices"
        )
    return EpochLoader(
        trainer,
        num_workers,
        dataset=dataset,
        batch_size=batch_size,
        drop_last=full_batches and len(sampler) >= batch_size,
        sampler=sampler,
    )


def single_pass_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, trainer: Trainer
) -> DataLoader[Batch]:
    """Return batches that contain each image exactly once, on one of the processes."""
    return DataLoader(
        BatchedDataset(dataset),
        batch_size=None,
        sampler=EvenBatches(len(dataset), batch_size, *processes(trainer)),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def support_loader(
    dataset: SampleDataset,
    support_images: int,
    seed: int,
    shuffle: bool,
    batch_size: int,
    num_workers: int,
    trainer: Trainer | None,
) -> DataLoader[Batch]:
    """Return batches of one category each; each image comes with support images of its category.

    Args:
        dataset: The training images.
        support_images: Number of support images per image.
        seed: Seed of the batches and of the support images.
        shuffle: Whether to shuffle images and batches each epoch.
        batch_size: Images per batch.
        num_workers: Number of data loader workers.
        trainer: The trainer, if any.
    """
    rows = normal_rows(dataset)
    return EpochLoader(
        trainer,
        num_workers,
        dataset=SupportedBatches(dataset, rows, support_images, seed),
        batch_size=None,
        sampler=CategoryBatches(rows, batch_size, seed, *processes(trainer), shuffle=shuffle),
    )


def evaluation_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, trainer: Trainer | None
) -> DataLoader[Batch]:
    """Return batches that contain each image exactly once, in the order of the listing.

    Images to predict that cannot be read are described in their batch.

    Raises:
        ValueError: If there are fewer images than processes.
    """
    world_size, rank = processes(trainer)
    sampler = None
    if world_size > 1:
        count = len(dataset)  # type: ignore[arg-type]
        if count < world_size:
            raise ValueError(
                f"{count} images cannot be shared by {world_size} processes: "
                f"lower trainer.devices or trainer.num_nodes"
            )
        # Unlike DistributedSampler, this sampler never repeats images to even out the ranks.
        sampler = UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=False,
        sampler=sampler,
        collate_fn=dataset.collate if isinstance(dataset, PredictionImages) else None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
