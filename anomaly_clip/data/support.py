"""Training batches of one category each, every image with others of its category beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, default_collate

from anomaly_clip.data.samplers import Draw
from anomaly_clip.data.samples import SampleDataset

__all__ = ["CategoryBatches", "SupportedBatches", "normal_rows"]

SUPPORT = 0x5099  # purpose: a stream of random numbers of its own


def normal_rows(dataset: SampleDataset) -> dict[str, list[int]]:
    """Return the rows of the normal images of each category.

    Raises:
        ValueError: If a category has a single one, so that there is nothing to put beside it.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(dataset.samples):
        if not sample.label:
            rows.setdefault(sample.category, []).append(row)
    for category, members in rows.items():
        if len(members) < 2:
            raise ValueError(
                f"category {category!r} has 1 normal training image, and each is compared with "
                f"others of its category: add some, or leave it out in data.train_categories"
            )
    return rows


class CategoryBatches(DistributedSampler[Any]):
    """Hand out batches of rows of one category, drawn by (seed, epoch), shared among processes.

    Processes get equally many batches; what is left over is dropped, other batches each epoch.

    Args:
        rows: The rows of each category.
        batch_size: How many rows a batch has at most.
        seed: Another seed gives other batches.
        num_processes: How many share an epoch.
        rank: Which of them this is.
        shuffle: False takes categories and rows in their order.

    Example:
        >>> from anomaly_clip.data.support import CategoryBatches
        >>> batches = CategoryBatches({"a": [0, 1, 2], "b": [3, 4]}, batch_size=2, seed=0)
        >>> sorted(sorted(row for _, row in batch) for batch in batches)[-1]
        [3, 4]
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[int]],
        batch_size: int,
        seed: int,
        num_processes: int = 1,
        rank: int = 0,
        shuffle: bool = True,
    ) -> None:
        count = sum(-(-len(members) // batch_size) for members in rows.values())
        if count < num_processes:
            raise ValueError(
                f"{count} training batches of one category each cannot be shared by "
                f"{num_processes} processes: lower data.batch_size or trainer.devices"
            )
        options = {"shuffle": shuffle, "seed": seed, "drop_last": True}
        super().__init__(range(count), num_processes, rank, **options)  # type: ignore[arg-type]
        self.rows = rows
        self.batch_size = batch_size
        self.skip = 0
        """How many of a process's batches are left out, as they were seen in this epoch."""

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for members in self.rows.values():
            order = rng.permutation(members) if self.shuffle else np.asarray(members)
            batches += np.split(order, range(self.batch_size, len(order), self.batch_size))
        places = rng.permutation(len(batches)) if self.shuffle else np.arange(len(batches))
        for place in places[self.rank : self.total_size : self.num_replicas][self.skip :]:
            yield [Draw(self.epoch, int(row)) for row in batches[place]]


class SupportedBatches(Dataset[Any]):
    """Batches with ``support``: for each image others of its category, drawn with replacement.

    They are drawn by (seed, epoch, row), never the image itself.

    Args:
        dataset: The images.
        rows: The rows of each category that support is drawn from.
        count: How many images support each.
        seed: Another seed gives others.
    """

    def __init__(
        self, dataset: SampleDataset, rows: Mapping[str, Sequence[int]], count: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.count = count
        self.seed = seed

    def support_of(self, draw: Draw) -> list[int]:
        """Return which rows are put beside a row."""
        epoch, row = draw
        others = [r for r in self.rows[self.dataset.samples[row].category] if r != row]
        rng = np.random.default_rng([self.seed, SUPPORT, epoch, row])
        return [others[place] for place in rng.integers(len(others), size=self.count)]

    def __getitem__(self, draws: list[Draw]) -> Any:
        items = []
        for draw in draws:
            support = [self.dataset[row]["image"] for row in self.support_of(draw)]
            items.append({**self.dataset[draw], "support": torch.stack(support)})
        return default_collate(items)
