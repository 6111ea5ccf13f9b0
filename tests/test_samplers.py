from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from regad_runs import three_categories
from torch.testing import assert_close

from anomaly_clip.data import MVTecAD, Sample
from anomaly_clip.data.samplers import (
    CategoryBatches,
    EpochSampler,
    EvenBatches,
    SupportedBatches,
    draw_few,
    hold_out,
    normal_rows,
)
from anomaly_clip.records import Draw


@pytest.fixture
def three(mvtec_root: Path) -> Path:
    return three_categories(mvtec_root)


def drawn(epoch: int, num_processes: int = 1, rank: int = 0, seed: int = 0) -> list[Draw]:
    sampler = EpochSampler(range(10), seed, num_processes, rank)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_epoch_yields_every_index_once_in_a_new_order() -> None:
    first, second = drawn(0), drawn(1)
    assert sorted(draw.index for draw in first) == list(range(10))
    assert {draw.epoch for draw in second} == {1}
    assert [draw.index for draw in first] != [draw.index for draw in second]
    assert first == drawn(0)
    assert first != drawn(0, seed=1)


def test_processes_share_an_epoch_evenly() -> None:
    parts = [drawn(3, 3, rank) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]  # the tenth sample is dropped
    whole = drawn(3)
    assert {draw for part in parts for draw in part} == set(whole[:9])


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 training samples cannot be shared by 3 processes"):
        EpochSampler(range(2), 0, 3)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 17])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_even_batches_give_each_process_the_same_number_of_batches(
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


def test_batches_are_of_one_category_and_hold_every_image_once() -> None:
    rows = {"a": list(range(7)), "b": [7, 8, 9], "c": [10, 11]}
    names = {row: name for name, members in rows.items() for row in members}

    def epoch(number: int, **options: Any) -> list[list[int]]:
        sampler = CategoryBatches(rows, 3, seed=1, **options)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(draw.epoch == number for batch in batches for draw in batch)
        return [[draw.index for draw in batch] for batch in batches]

    first = epoch(0)
    assert sorted(len(batch) for batch in first) == [1, 2, 3, 3, 3]
    assert all(len({names[row] for row in batch}) == 1 for batch in first)
    assert sorted(row for batch in first for row in batch) == list(range(12))
    assert first == epoch(0)
    assert first != epoch(1)
    shared = [epoch(0, num_processes=2, rank=rank) for rank in (0, 1)]
    assert len(shared[0]) == len(shared[1]) == 2
    assert not {r for batch in shared[0] for r in batch} & {r for b in shared[1] for r in b}
    assert epoch(0, shuffle=False) == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9], [10, 11]]
    with pytest.raises(ValueError, match="5 training batches of one category each"):
        epoch(0, num_processes=6)


def test_support_images_are_other_images_of_the_category(three: Path) -> None:
    data = MVTecAD(str(three), image_size=16, num_workers=0)
    dataset = data.dataset("train")
    rows = normal_rows(dataset)
    batches = SupportedBatches(dataset, rows, 3, seed=4)
    seen = set()
    for epoch in range(8):
        for row, sample in enumerate(dataset.samples):
            support = batches.support_of(Draw(epoch, row))
            assert len(support) == 3
            assert row not in support
            assert {dataset.samples[r].category for r in support} == {sample.category}
            assert support == SupportedBatches(dataset, rows, 3, seed=4).support_of(
                Draw(epoch, row)
            )
            seen.add((row, tuple(support)))
    assert len(seen) > 3 * len(dataset)  # different support images each epoch
    batch = batches[[Draw(0, 0), Draw(0, 2)]]
    assert batch["support"].shape == (2, 3, 3, 16, 16)
    assert batch["support"].dtype == torch.uint8
    support = batches.support_of(Draw(0, 2))
    # The category's other images are sampled by a random stream per (seed, epoch, row).
    others = [other for other in rows[dataset.samples[2].category] if other != 2]
    drawn = np.random.default_rng([4, 0x5099, 0, 2]).integers(len(others), size=3)
    assert support == [others[place] for place in drawn]
    assert_close(batch["support"][1, 0], dataset[support[0]]["image"])


def test_few_rows_are_the_first_of_one_permutation_and_sorted() -> None:
    order = np.random.default_rng([3, zlib.crc32(b"nut")]).permutation(50)
    for few in (1, 2, 7, 50):
        assert draw_few(50, few, 3, "nut") == sorted(order[:few].tolist())
    assert draw_few(50, 7, 3, "nut") != draw_few(50, 7, 3, "bolt")


@pytest.mark.parametrize(("count", "enough"), [(1, False), (2, True)])
def test_two_normal_images_support_each_other(count: int, enough: bool) -> None:
    normal = [Sample(Path(f"{number}.png"), "nut", label=False) for number in range(count)]
    dataset: Any = SimpleNamespace(samples=[*normal, Sample(Path("x.png"), "nut", label=True)])
    if enough:
        assert normal_rows(dataset) == {"nut": [0, 1]}
        return
    with pytest.raises(ValueError, match="'nut' has 1 normal training image"):
        normal_rows(dataset)
