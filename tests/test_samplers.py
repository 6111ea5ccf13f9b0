from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from anomaly_clip.data.samplers import EpochSampler, EvenBatches, hold_out
from anomaly_clip.records import Draw


def drawn(epoch: int, num_processes: int = 1, rank: int = 0, seed: int = 0) -> list[Draw]:
    sampler = EpochSampler(range(10), seed, num_processes, rank)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_draws_every_index_once_in_an_order_of_its_own() -> None:
    first, second = drawn(0), drawn(1)
    assert sorted(draw.index for draw in first) == list(range(10))
    assert {draw.epoch for draw in second} == {1}
    assert [draw.index for draw in first] != [draw.index for draw in second]
    assert first == drawn(0)
    assert first != drawn(0, seed=1)


def test_processes_share_an_epoch_evenly() -> None:
    parts = [drawn(3, 3, rank) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]  # the tenth is dropped
    whole = drawn(3)
    assert {draw for part in parts for draw in part} == set(whole[:9])


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 training samples cannot be shared by 3 processes"):
        EpochSampler(range(2), 0, 3)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 17])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_even_batches_are_as_many_on_each_process(
    length: int, batch_size: int, num_processes: int
) -> None:
    parts = [
        list(EvenBatches(length, batch_size, num_processes, rank)) for rank in range(num_processes)
    ]
    assert len({len(batches) for batches in parts}) == 1
    assert all(batch for batches in parts for batch in batches)
    assert sorted(i for batches in parts for batch in batches for i in batch) == list(range(length))
    most = batch_size if num_processes == 1 else max(2, batch_size)
    assert max(len(batch) for batches in parts for batch in batches) <= most


@pytest.mark.parametrize("share", [0.05, 0.25, 0.3])
def test_a_share_of_each_group_is_held_out(share: float) -> None:
    sizes = {"a": 3, "b": 7, "c": 10, "d": 29}
    groups = [name for name, size in sizes.items() for _ in range(size)]
    held = hold_out(groups, share, seed=0)
    counts = Counter(groups[row] for row in held)
    expected = {name: int(np.rint(share * size)) for name, size in sizes.items()}
    assert {name: counts[name] for name in sizes} == expected
    assert hold_out(groups, share, seed=0) == held
    assert hold_out(groups, share, seed=1) != held
