"""A loader of training batches that goes on where an interrupted fit was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from anomaly_clip.data.samplers import CategoryBatches, EpochSampler

__all__ = ["EpochLoader"]


class EpochLoader(DataLoader[Any]):
    """Load the batches of an epoch when the first of them is asked for, not before.

    Lightning makes the iterator of the first epoch before it reads a checkpoint's epoch and place;
    processes that load ahead would begin with other samples than those to come.

    Args:
        done: Returns how many batches of the epoch were trained on already.
        options: Of :class:`torch.utils.data.DataLoader`; the sampler is an
            :class:`~anomaly_clip.data.samplers.EpochSampler`, or, without a batch_size, of
            :class:`~anomaly_clip.data.samplers.CategoryBatches`.
    """

    def __init__(self, *, done: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self.done = done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, (EpochSampler, CategoryBatches))
        self.sampler.skip = self.done() * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer knows epoch and place; this tells it that they are enough."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing; see :meth:`state_dict`."""
