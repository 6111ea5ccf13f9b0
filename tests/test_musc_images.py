from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomaly_clip.methods import musc_images
from anomaly_clip.methods.musc_images import (
    ImageFeatures,
    check_count,
    drawn_order,
    gather_rows,
    names_of_all,
    resize_grids,
    warn_of_few,
)

CPU = torch.device("cpu")


def features(index: list[int]) -> ImageFeatures:
    """Return features that tell the index of their image."""
    numbers = torch.tensor(index)
    return ImageFeatures({"a": numbers[:, None].half(), "b": -numbers.float()}, numbers)


def check(actual: ImageFeatures, index: list[int]) -> None:
    assert actual.index.tolist() == index
    assert actual.tensors["a"][:, 0].tolist() == index
    assert actual.tensors["b"].tolist() == [-number for number in index]
    assert len(actual) == len(index)


def test_parts_are_joined_and_selected() -> None:
    joined = ImageFeatures.joined([features([3, 1]), features([7])])
    check(joined, [3, 1, 7])
    check(joined[1:], [1, 7])
    check(joined[torch.tensor([2, 0])], [7, 3])
    check(ImageFeatures.joined([joined]), [3, 1, 7])


def test_categories_are_split_in_the_order_of_their_first_image() -> None:
    parts = list(features([0, 1, 2, 3, 4]).split(["b", "a", "b", "c", "a"]))
    assert [name for name, _ in parts] == ["b", "a", "c"]
    for (_, part), index in zip(parts, ([0, 2], [1, 4], [3]), strict=True):
        check(part, index)


def test_one_process_has_all_images_in_the_order_of_their_index() -> None:
    gathered = ImageFeatures.gathered(features([4, 0, 2]), CPU)
    assert gathered is not None
    check(gathered, [0, 2, 4])
    assert ImageFeatures.gathered(None, CPU) is None
    assert gather_rows({}, CPU) == {}
    assert names_of_all(["b", "a", "b"]) == ["b", "a"]


def test_rows_of_several_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, simulated: the other one has two images, this one has none or one."""
    other = features([5, 2])
    theirs = {"index": other.index, **other.tensors}

    class Processes:
        @staticmethod
        def get_world_size() -> int:
            return 2

        @staticmethod
        def all_gather_object(received: list[Any], sent: Any) -> None:
            received[:] = [sent, {k: (v.shape, v.dtype) for k, v in theirs.items()}]

        @staticmethod
        def all_gather(received: list[Tensor], sent: Tensor) -> None:
            [name] = [k for k, v in theirs.items() if v.dtype == sent.dtype]
            received[0].copy_(sent)
            received[1].copy_(theirs[name])

    monkeypatch.setattr(musc_images, "dist", Processes)
    monkeypatch.setattr(musc_images, "_is_alone", lambda: False)
    gathered = ImageFeatures.gathered(None, CPU)
    assert gathered is not None
    check(gathered, [2, 5])
    gathered = ImageFeatures.gathered(features([3]), CPU)
    assert gathered is not None
    check(gathered, [2, 3, 5])


def test_the_drawn_order_depends_on_seed_and_category() -> None:
    orders = {
        (seed, name): drawn_order(30, seed, name).tolist() for seed in (0, 1) for name in ("a", "b")
    }
    for order in orders.values():
        assert sorted(order) == list(range(30))
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(7)  # no global state
    state = torch.get_rng_state()
    assert drawn_order(30, 0, "a").tolist() == orders[0, "a"]
    assert torch.equal(state, torch.get_rng_state())


def test_grids_are_averaged_or_interpolated() -> None:
    grids = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_grids(grids, torch.Size((4, 4))) is grids
    averaged = resize_grids(grids, torch.Size((2, 2)))
    assert averaged.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    finer = resize_grids(averaged, torch.Size((4, 4)))
    row = [2.5, 3.0, 4.0, 4.5]  # half-pixel centres: a quarter and three quarters in between
    assert finer[0, 0, 0].tolist() == row


def test_few_images_are_logged_and_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"but tile has {n}: give at least 2, better 20"):
            check_count(n, "tile")
    for n in (2, 4, 5, 100):
        check_count(n, "tile")
        warn_of_few(n, "tile")
    err = capsys.readouterr().err
    assert "tile has 2 images; scores of fewer than 5 are weak" in err
    assert "tile has 4 images" in err
    assert err.count("weak") == 2
