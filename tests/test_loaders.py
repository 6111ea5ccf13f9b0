from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import save_picture
from torch.utils.data import Dataset

from anomaly_clip.data import (
    MVTecAD,
)
from anomaly_clip.data.loaders import (
    EpochLoader,
    evaluation_loader,
    processes,
    single_pass_loader,
    support_loader,
    training_loader,
)
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.records import Draw


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def test_training_order_comes_from_seed_and_epoch(mvtec_root: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = tiny(mvtec_root, seed=seed, batch_size=1)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return [int(batch["index"]) for batch in loader]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(1, epoch)) for epoch in range(9)}) > 1


def test_categories_may_be_seen_equally_often(mvtec_root: Path) -> None:
    for number in range(2, 8):
        save_picture(
            mvtec_root / "bottle" / "train" / "good" / f"{number:03d}.png", size=20 + number
        )
    data = tiny(mvtec_root, balanced=True)
    data.setup("fit")
    seen = [name for batch in data.train_dataloader() for name in batch["category"]]
    assert Counter(seen) == {"bottle": 5, "metal_nut": 5}


class Numbers(Dataset[Any]):
    """A data set whose items are their own indices."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | Draw) -> int:
        return index.index if isinstance(index, Draw) else index


def trainer(processed: int = 0, world_size: int = 1, rank: int = 0) -> Any:
    """Return the attributes of a trainer that loaders read."""
    current = SimpleNamespace(processed=processed)
    loop = SimpleNamespace(batch_progress=SimpleNamespace(current=current))
    return SimpleNamespace(
        world_size=world_size, global_rank=rank, fit_loop=SimpleNamespace(epoch_loop=loop)
    )


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize(
    ("count", "full", "sizes"),
    [
        (7, False, [3, 3, 1]),
        (7, True, [3, 3]),  # the last batch is partial
        (6, True, [3, 3]),
        (3, True, [3]),
        (2, True, [2]),  # the only batch is kept
        (2, False, [2]),
    ],
)
def test_a_partial_last_batch_is_dropped_on_request(
    count: int, full: bool, sizes: list[int]
) -> None:
    sampler = EpochSampler(range(count), seed=0)
    loader = training_loader(Numbers(count), sampler, 3, 0, None, full_batches=full)
    drawn = batches(loader)
    assert [len(batch) for batch in drawn] == sizes
    order = [draw.index for draw in EpochSampler(range(count), seed=0)]
    assert [row for batch in drawn for row in batch] == order[: sum(sizes)]
    assert len(loader) == len(sizes)


@pytest.mark.parametrize(("count", "processes"), [(1, 1), (5, 3)])
def test_a_single_image_is_no_batch_for_batch_norm(count: int, processes: int) -> None:
    sampler = EpochSampler(range(count), seed=0, num_processes=processes)
    with pytest.raises(ValueError, match=f"{count} training images for {processes} processes"):
        training_loader(Numbers(count), sampler, 3, 0, None, full_batches=True)


@pytest.mark.parametrize("processed", [0, 1, 2])
def test_a_resumed_epoch_continues_after_the_batches_already_seen(processed: int) -> None:
    def loader(trainer: Any) -> EpochLoader:
        sampler = EpochSampler(range(7), seed=0)
        loader = training_loader(Numbers(7), sampler, 3, 0, trainer)
        assert isinstance(loader, EpochLoader)
        return loader

    whole = batches(loader(None))
    resumed = loader(trainer(processed))
    assert batches(resumed) == whole[processed:]
    assert resumed.state_dict() == {}  # the trainer knows the position
    resumed.load_state_dict({"anything": 1})
    assert batches(resumed) == whole[processed:]


def test_processes_are_one_without_a_trainer() -> None:
    assert processes(None) == (1, 0)
    assert processes(trainer(world_size=3, rank=2)) == (3, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_single_pass_yields_every_image_once(world_size: int) -> None:
    parts = [
        batches(single_pass_loader(Numbers(11), 2, 0, trainer(0, world_size, rank)))
        for rank in range(world_size)
    ]
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(11))
    # All processes have the same number of steps, because they wait for each other.
    assert len({len(part) for part in parts}) == 1
    assert max(len(batch) for part in parts for batch in part) <= 2


def test_support_batches_resume_too(mvtec_root: Path) -> None:
    dataset = tiny(mvtec_root).dataset("train")

    def loaded(trainer: Any, shuffle: bool = True) -> list[Any]:
        return list(support_loader(dataset, 1, 0, shuffle, 1, 0, trainer))

    whole = loaded(None)
    assert [batch["support"].shape for batch in whole] == [(1, 1, 3, 16, 16)] * 4
    rest = loaded(trainer(3))
    assert [batch["index"].tolist() for batch in rest] == [whole[3]["index"].tolist()]
    assert torch.equal(rest[0]["support"], whole[3]["support"])
    assert [int(batch["index"]) for batch in loaded(None, shuffle=False)] == [0, 1, 2, 3]


def test_evaluation_keeps_the_order_and_repeats_no_image() -> None:
    assert batches(evaluation_loader(Numbers(5), 2, 0, None)) == [[0, 1], [2, 3], [4]]
    parts = [batches(evaluation_loader(Numbers(5), 2, 0, trainer(0, 2, rank))) for rank in (0, 1)]
    assert parts == [[[0, 2], [4]], [[1, 3]]]
    with pytest.raises(ValueError, match="2 images cannot be shared by 3 processes"):
        evaluation_loader(Numbers(2), 2, 0, trainer(0, 3, 0))
