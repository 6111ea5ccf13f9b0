from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anomaly_clip.methods import image_features
from anomaly_clip.methods.image_features import (
    ImageFeatures,
    check_count,
    gather_rows,
    names_of_all,
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

    monkeypatch.setattr(image_features, "dist", Processes)
    monkeypatch.setattr(image_features, "_is_alone", lambda: False)
    gathered = ImageFeatures.gathered(None, CPU)
    assert gathered is not None
    check(gathered, [2, 5])
    gathered = ImageFeatures.gathered(features([3]), CPU)
    assert gathered is not None
    check(gathered, [2, 3, 5])


def test_few_images_are_logged_and_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"but tile has {n}: give at least 2, better 20"):
            check_count(n, "tile", "MuSc")
    for n in (2, 4, 5, 100):
        check_count(n, "tile", "MuSc")
        warn_of_few(n, "tile", "MuSc")
    err = capsys.readouterr().err
    assert "MuSc: tile has 2 images; scores of fewer than 5 are weak" in err
    assert "tile has 4 images" in err
    assert err.count("weak") == 2
