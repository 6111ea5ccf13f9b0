"""Samplers that choose the training samples of an epoch, identically on every machine.

Every random choice about a training sample depends on (seed, epoch, index). The epoch is passed
with each index, because persistent data loader workers would not notice a new epoch otherwise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler, default_collate

from anomaly_clip.files import name_bytes
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

SUPPORT = 0x5099  # part of a seed: support images have their own stream of random numbers


class EpochSampler(DistributedSampler[Any]):
    """Yield every index once per epoch, shuffled with the seed (seed, epoch).

    Lightning sets the epoch of samplers, also after a resume, and does not replace distributed
    samplers. The indices are shared among the processes. All processes get the same number of
    indices; the remainder is dropped.

    Args:
        dataset: The sampled data set; only its length matters.
        seed: Seed of the order.
        num_processes: Number of processes that share an epoch.
        rank: Rank of this process.
        groups: The group of each index; default: none. If given, all groups are sampled equally
            often in an epoch of the same length: images of small groups occur several times, and
            some images of large groups do not occur.
        shuffle: Whether to shuffle; otherwise, indices are in ascending order.

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
        """Number of a process's indices to skip, because they were already seen in this epoch."""

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
    """Yield each index once, on one of the processes, in equally many batches per process.

    Unequal numbers would block training, because each step waits for all processes.

    Args:
        length: Number of samples.
        batch_size: Maximum number of samples per batch; raised to 2 if several processes share the
            samples.
        num_processes: Number of processes that share the samples.
        rank: Rank of this process.
    """

    def __init__(self, length: int, batch_size: int, num_processes: int = 1, rank: int = 0) -> None:
        if length < num_processes:
            raise ValueError(
                f"{length} training samples cannot be shared by {num_processes} processes: "
                f"lower trainer.devices or trainer.num_nodes"
            )
        super().__init__(range(length), num_processes, rank, shuffle=False)  # type: ignore[arg-type]
        # With batches of one sample, a process with one sample fewer would have one batch fewer.
        most = batch_size if num_processes == 1 else max(2, batch_size)
        count = math.ceil(math.ceil(length / num_processes) / most)
        indices = np.arange(rank, length, num_processes)
        self.batches = [part.tolist() for part in np.array_split(indices, count)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class BatchedDataset(Dataset[Any]):
    """Data set of batches; an index is a list of rows, as :class:`EvenBatches` yields them.

    The data loader cannot form these batches itself, because Lightning replaces batch samplers.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: list[int]) -> Any:
        return default_collate([self.dataset[row] for row in rows])


def balanced_order(groups: Sequence[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return ``len(groups)`` indices in which all groups occur equally often (to within one).

    The indices of a group are repeated as often as needed, each time in a different order.

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
    # Rounding up gives too many indices; the groups are mixed before the excess is cut off.
    rows = np.stack(columns, axis=1)
    mixed = np.concatenate([rng.permutation(row) for row in rows])[: len(groups)]
    return rng.permutation(mixed)


def draw_few(
    count: int, few: int, seed: int, name: str, usable: Callable[[int], bool] | None = None
) -> list[int]:
    """Sample ``few`` of ``count`` rows with the seed (seed, name), and sort them.

    Smaller samples are subsets of larger ones. A row that is not usable is replaced by the next row
    of the random order, so that the other rows of the sample stay the same.

    Args:
        count: Number of rows.
        few: Size of the sample.
        seed: Seed of the random order, combined with ``name``.
        name: The name.
        usable: Returns whether a row may be sampled; default: all may.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name_bytes(name))])
    order = rng.permutation(count).tolist()
    return sorted(islice(order if usable is None else filter(usable, order), few))


def hold_out(groups: Sequence[Hashable], share: float, seed: int) -> set[int]:
    """Sample a fraction of each group's rows, with the seed (seed, number of all rows)."""
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
        ValueError: If a category has a single normal image, which cannot be compared with others.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(dataset.samples):
        if not sample.label:
            rows.setdefault(sample.category, []).append(row)
    for category, members in rows.items():
        if len(members) < 2:
            raise ValueError(
                f"category {category!r} has 1 normal training image, but training compares each "
                f"image with others of its category: add images, or leave the category out of "
                f"data.train_categories"
            )
    return rows


class CategoryBatches(DistributedSampler[Any]):
    """Yield batches of rows of a single category, shuffled with the seed (seed, epoch).

    The batches are shared among the processes. All processes get the same number of batches; the
    remainder is dropped and consists of different batches each epoch.

    Args:
        rows: The rows of each category.
        batch_size: Maximum number of rows per batch.
        seed: Seed of the batches.
        num_processes: Number of processes that share an epoch.
        rank: Rank of this process.
        shuffle: Whether to shuffle; otherwise, categories and rows keep their order.

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
        """Number of a process's batches to skip, because they were already seen in this epoch."""

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
    """Batches with ``support``: for each image, other images of its category.

    Support images are sampled with replacement and with the seed (seed, epoch, row). They never
    include the image itself.

    Args:
        dataset: The images.
        rows: The rows of each category from which support images are sampled.
        count: Number of support images per image.
        seed: Seed of the support images.
    """

    def __init__(
        self, dataset: SampleDataset, rows: Mapping[str, Sequence[int]], count: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.count = count
        self.seed = seed

    def support_of(self, draw: Draw) -> list[int]:
        """Return the rows of the support images of a row."""
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
