"""Samplers: the samples that an epoch draws, the same everywhere for the number of an epoch.

Every random draw of a training sample comes from (seed, epoch, index). The epoch travels with the
index, as loading processes that live on would never hear of a new one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler, default_collate

from anomaly_clip.records import Draw

if TYPE_CHECKING:
    from anomaly_clip.data.samples import SampleDataset

__all__ = [
    "BatchedDataset",
    "CategoryBatches",
    "EpochSampler",
    "EvenBatches",
    "SupportedBatches",
    "balanced_order",
    "draw_few",
    "hold_out",
    "normal_rows",
]

SUPPORT = 0x5099  # purpose: a stream of random numbers of its own


class EpochSampler(DistributedSampler[Any]):
    """Hand out every index once an epoch, shuffled by (seed, epoch), shared among processes.

    Lightning tells samplers the epoch, also after a resume, and leaves distributed ones alone.
    Processes get equally many; what is left over is dropped.

    Args:
        dataset: What is sampled; its length counts.
        seed: Another seed gives another order.
        num_processes: How many share an epoch.
        rank: Which of them this is.
        groups: One name an index. Each group is then drawn equally often: an epoch is as long as
            without, the images of small groups come several times, of large ones a part.
        shuffle: False hands the indices out in their order.

    Example:
        >>> from anomaly_clip.data.samplers import EpochSampler
        >>> sampler = EpochSampler(range(3), seed=0)
        >>> sampler.set_epoch(2)
        >>> sorted(sampler)
        [Draw(epoch=2, index=0), Draw(epoch=2, index=1), Draw(epoch=2, index=2)]
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int,
        num_processes: int = 1,
        rank: int = 0,
        groups: Sequence[str] | None = None,
        shuffle: bool = True,
    ) -> None:
        if len(dataset) < num_processes:
            raise ValueError(
                f"{len(dataset)} training samples cannot be shared by {num_processes} processes: "
                f"lower trainer.devices or trainer.num_nodes"
            )
        assert isinstance(dataset, (Dataset, range))
        options = {"shuffle": shuffle, "seed": seed, "drop_last": True}
        super().__init__(dataset, num_processes, rank, **options)  # type: ignore[arg-type]
        self.groups = groups
        self.skip = 0
        """How many of a process's indices are left out, as they were seen in this epoch."""

    def __iter__(self) -> Iterator[Draw]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.shuffle:
            order = np.arange(len(self.dataset))  # type: ignore[arg-type]
        elif self.groups is None:
            order = rng.permutation(len(self.dataset))  # type: ignore[arg-type]
        else:
            order = balanced_order(self.groups, rng)
        indices = order[self.rank : self.total_size : self.num_replicas]
        return (Draw(self.epoch, int(index)) for index in indices[self.skip :])


class EvenBatches(DistributedSampler[Any]):
    """Every index once, on one process, in as many batches on each: steps wait for each other.

    Args:
        length: How many samples there are.
        batch_size: Samples of a batch at most, 2 or more where several processes share them.
        num_processes: How many share them.
        rank: Which of them this is.
    """

    def __init__(self, length: int, batch_size: int, num_processes: int = 1, rank: int = 0) -> None:
        if length < num_processes:
            raise ValueError(
                f"{length} training samples cannot be shared by {num_processes} processes: "
                f"lower trainer.devices or trainer.num_nodes"
            )
        super().__init__(range(length), num_processes, rank, shuffle=False)  # type: ignore[arg-type]
        # With single samples a process that has one less would have a batch less.
        most = batch_size if num_processes == 1 else max(2, batch_size)
        count = math.ceil(math.ceil(length / num_processes) / most)
        indices = np.arange(rank, length, num_processes)
        self.batches = [part.tolist() for part in np.array_split(indices, count)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class BatchedDataset(Dataset[Any]):
    """Batches of a data set by their rows, as :class:`EvenBatches` draws them.

    A loader's own batches would not do: Lightning replaces samplers of batches.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: list[int]) -> Any:
        return default_collate([self.dataset[row] for row in rows])


def balanced_order(groups: Sequence[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return as many indices as there are, each group drawn equally often (to within one).

    A group is gone through again and again, each time in another order.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.data.samplers import balanced_order
        >>> order = balanced_order(["a", "a", "a", "b"], np.random.default_rng(0))
        >>> int(sum(order == 3))
        2
    """
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    share = -(-len(groups) // len(names))
    columns = []
    for number in range(len(names)):
        members = np.flatnonzero(numbers == number)
        rounds = [rng.permutation(members) for _ in range(-(-share // len(members)))]
        columns.append(np.concatenate(rounds)[:share])
    # What rounding up gives too many is cut off the end of a mix of all groups.
    rows = np.stack(columns, axis=1)
    mixed = np.concatenate([rng.permutation(row) for row in rows])[: len(groups)]
    return rng.permutation(mixed)


def draw_few(count: int, few: int, seed: int, name: str) -> list[int]:
    """Draw ``few`` of ``count`` rows by (seed, name), sorted; fewer are among more."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return sorted(rng.permutation(count)[:few].tolist())


def hold_out(groups: Sequence[Hashable], share: float, seed: int) -> set[int]:
    """Draw a share of the rows of each group by (seed, number of rows)."""
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    rng = np.random.default_rng([seed, len(groups)])
    held: set[int] = set()
    for members in rows.values():
        held.update(rng.choice(members, round(share * len(members)), replace=False).tolist())
    return held


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
        >>> from anomaly_clip.data.samplers import CategoryBatches
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
        """Number of a process's batches left out, as they were seen in this epoch."""

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
        """Return the rows that are put beside a row."""
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
