from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_clip.data import Sample
from anomaly_clip.recording.image_records import ImageRecords, with_kinds
from anomaly_clip.records import Batch, Scores


def trainer(rank: int = 0, world_size: int = 1, barrier: threading.Barrier | None = None) -> Any:
    """Return a stand-in for a trainer; its processes are threads that wait at a barrier."""

    def wait(_: str) -> None:
        if barrier is not None:
            barrier.wait(timeout=20)

    strategy = SimpleNamespace(barrier=wait)
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, strategy=strategy, is_global_zero=rank == 0
    )


def module(is_detector: bool = True) -> Any:
    def image_rows(outputs: Any, batch: Batch) -> list[dict[str, Any]]:
        values = (outputs["image_score"] if is_detector else outputs).tolist()
        return [
            {"category": category, "image_score": value}
            for category, value in zip(batch["category"], values, strict=True)
        ]

    return SimpleNamespace(is_detector=is_detector, image_rows=image_rows)


def batch_of(indices: list[int], categories: str, labels: list[bool], masks: Tensor) -> Batch:
    return Batch(
        image=torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8),
        label=torch.tensor(labels),
        category=list(categories),
        path=[f"{index}.png" for index in indices],
        index=torch.tensor(indices),
        mask=masks,
    )


def scores_of(*values: float, side: int = 4) -> Scores:
    """Return image scores, and maps that rise from the image's score to the score plus 1."""
    ramp = torch.linspace(0, 1, side * side).view(1, side, side)
    image_score = torch.tensor(values)
    return Scores(image_score=image_score, anomaly_map=image_score.view(-1, 1, 1) + ramp)


def masks(*pixels: int) -> Tensor:
    """Return one mask per number, with that many anomalous pixels."""
    return torch.stack([torch.arange(16).view(4, 4) < count for count in pixels])


def records_of(folder: Path, **options: Any) -> ImageRecords:
    return ImageRecords(
        folder, **{"with_stages": False, "longest": None, "with_maps": True, **options}
    )


def test_rows_and_ranges_are_gathered_in_the_order_of_the_listing(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    flags = [False, True]
    records.keep(module(), scores_of(5.0, -1.0), batch_of([7, 2], "ab", flags, masks(0, 3)))
    records.keep(module(), scores_of(0.5, 9.0), batch_of([10, 3], "ab", flags, masks(0, 1)))
    rows, ranges, without_pixels = records.gather(trainer())
    assert list(rows) == [2, 3, 7, 10]
    assert [row["image_score"] for row in rows.values()] == [-1.0, 9.0, 5.0, 0.5]
    assert ranges == {"a": [0.5, 6.0], "b": [-1.0, 10.0]}
    assert without_pixels == 0


def test_anomalous_images_without_an_anomalous_pixel_are_counted_once(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    labels = [True, True, False]
    for _ in range(2):  # a distributed sampler may repeat an image
        batch = batch_of([0, 1, 2], "aaa", labels, masks(0, 1, 0))
        records.keep(module(), scores_of(1.0, 2.0, 3.0), batch)
    assert records.gather(trainer())[2] == 1
    unlabelled = records_of(tmp_path / "other")
    batch = batch_of([0], "a", [True], masks(0))
    del batch["mask"]
    unlabelled.keep(module(), scores_of(1.0), batch)
    unlabelled.folder.mkdir(exist_ok=True)
    assert unlabelled.gather(trainer())[2] == 0


def test_the_records_of_all_processes_are_merged(tmp_path: Path) -> None:
    """The second process repeats an image of the first, and alone sees category c."""
    barrier = threading.Barrier(3)
    batches = [
        (scores_of(1.0, 4.0), batch_of([0, 3], "ab", [True, True], masks(0, 2))),
        (scores_of(2.0, -3.0, 1.0), batch_of([1, 4, 0], "aca", [True] * 3, masks(0, 5, 0))),
        (scores_of(8.0), batch_of([2], "b", [True], masks(0))),
    ]
    gathered: dict[int, Any] = {}

    def process(rank: int) -> None:
        records = records_of(tmp_path)
        records.keep(module(), *batches[rank])
        gathered[rank] = records.gather(trainer(rank, 3, barrier))

    threads = [threading.Thread(target=process, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(gathered) == 3
    rows, ranges, without_pixels = gathered[0]
    assert gathered[1] == gathered[2] == gathered[0]
    assert {index: row["image_score"] for index, row in rows.items()} == {
        0: 1.0, 1: 2.0, 2: 8.0, 3: 4.0, 4: -3.0,
    }  # fmt: skip
    assert list(rows) == [0, 1, 2, 3, 4]
    assert ranges == {"a": [1.0, 3.0], "b": [4.0, 9.0], "c": [-3.0, -2.0]}
    assert without_pixels == 3  # images 0, 1 and 2; image 0, which two processes saw, counts once


def test_scores_of_a_whole_evaluation_replace_those_of_steps(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    batch = batch_of([4, 6], "ab", [False, True], masks(0, 1))
    records.keep(module(), scores_of(1.0, 2.0), batch)
    records.replace_scores({})
    assert [row["image_score"] for row in records.rows.values()] == [1.0, 2.0]
    records.replace_scores({6: 0.25, 4: 0.75, 9: 0.0})
    assert {index: row["image_score"] for index, row in records.rows.items()} == {4: 0.75, 6: 0.25}


@pytest.mark.parametrize("longest", [None, 4, 2])
def test_maps_are_kept_at_their_size_or_shrunk(tmp_path: Path, longest: int | None) -> None:
    records = records_of(tmp_path, longest=longest)
    records.keep(module(), scores_of(1.0), batch_of([5], "a", [True], masks(1)))
    kept = records.maps.load(5)["map"]
    assert kept.shape == ((2, 2) if longest == 2 else (4, 4))
    if longest != 2:
        np.testing.assert_allclose(kept, scores_of(1.0)["anomaly_map"][0], atol=1e-3)
    assert records.gather(trainer())[1] == {"a": [1.0, 2.0]}  # range of the map before shrinking


def test_maps_are_kept_on_request_and_for_detectors_only(tmp_path: Path) -> None:
    batch = batch_of([0], "a", [True], masks(0))
    without = records_of(tmp_path, with_maps=False)
    without.keep(module(), scores_of(1.0), batch)
    assert (without.maps.indices, without.maps.ranges) == ([], {})
    probe = records_of(tmp_path)
    probe.keep(module(is_detector=False), torch.tensor([0.5]), batch)
    assert probe.rows == {0: {"category": "a", "image_score": 0.5}}
    assert probe.gather(trainer()) == (probe.rows, {}, 0)
    assert probe.maps.indices == []


def test_the_first_process_clears_up(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    records = records_of(folder)
    records.clear(trainer(rank=1, world_size=2))
    assert folder.is_dir()
    records.clear(trainer())
    assert not folder.exists()


def test_images_without_an_anomalous_pixel_add_up_over_batches(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    for first in (0, 2):
        batch = batch_of([first, first + 1], "aa", [True, True], masks(0, 3))
        records.keep(module(), scores_of(0.0, 1.0), batch)
    assert records.gather(trainer())[2] == 2


def test_rows_have_the_kind_of_defect_if_there_are_several() -> None:
    kinds = ["good", "cut", "dent", "cut"]
    samples = [Sample(Path(f"{kind}.png"), "nut", kind != "good", defect=kind) for kind in kinds]
    rows: dict[int, dict[str, Any]] = {n: {"label": int(n > 0)} for n in range(4)}
    assert [row["defect"] for row in with_kinds(rows, samples).values()] == [
        "",
        "cut",
        "dent",
        "cut",
    ]
    assert "defect" not in rows[1]
    del rows[2]
    assert with_kinds(rows, samples) is rows
    assert with_kinds({0: {"label": None}, 1: {"label": None}}, samples) == {
        0: {"label": None},
        1: {"label": None},
    }
