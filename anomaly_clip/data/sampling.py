"""Which samples an epoch draws, so that a number of an epoch gives the same draws everywhere.

Every random draw of a training sample comes from (seed, epoch, index). The epoch travels with the
index, as loading processes that live on would never hear of a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["Draw", "EpochSampler"]


class Draw(NamedTuple):
    """What a data set is asked for in training."""

    epoch: int
    index: int  # type: ignore[assignment]  # a tuple's method of that name is not missed


class EpochSampler(DistributedSampler[Any]):
    """Hand out every index once an epoch, shuffled by (seed, epoch), shared among processes.

    Lightning tells samplers the epoch, also after a resume, and leaves distributed ones alone.
    Processes get equally many; what is left over is dropped.

    Args:
        dataset: What is sampled; its length counts.
        seed: Another seed gives another order.
        num_processes: How many share an epoch.
        rank: Which of them this is.

    Example:
        >>> from anomaly_clip.data.sampling import EpochSampler
        >>> sampler = EpochSampler(range(3), seed=0)
        >>> sampler.set_epoch(2)
        >>> sorted(sampler)
        [Draw(epoch=2, index=0), Draw(epoch=2, index=1), Draw(epoch=2, index=2)]
    """

    def __init__(self, dataset: Sized, seed: int, num_processes: int = 1, rank: int = 0) -> None:
        if len(dataset) < num_processes:
            raise ValueError(
                f"{len(dataset)} training samples cannot be shared by {num_processes} processes: "
                f"lower trainer.devices or trainer.num_nodes"
            )
        assert isinstance(dataset, (Dataset, range))
        super().__init__(dataset, num_processes, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Draw]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset))  # type: ignore[arg-type]
        own = order[self.rank : self.total_size : self.num_replicas]
        return (Draw(self.epoch, int(index)) for index in own)
