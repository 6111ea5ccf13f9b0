from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anomaly_clip.data.listing import Listing
from anomaly_clip.data.samples import Sample


class Source:
    """A data module of three categories that records each listing."""

    root = Path("here")
    dataset_name = "Made"
    splits: tuple[str, ...] = ("train", "test")
    on_disk = False
    omits_copies = False
    mask_endings = ()
    mask_hint = ""

    def __init__(self, empty: str = "") -> None:
        self.empty = empty
        self.listed: list[tuple[str, str]] = []
        self.spare: list[Path] = []
        self.unreadable = SimpleNamespace(
            without=lambda samples, split: samples, tolerates=lambda split: False
        )
        self.calibration = SimpleNamespace(hold_out=None, is_scored=False)

    def find_categories(self) -> list[str]:
        return ["a", "b", "c"]

    def list_samples(self, category: str, split: str) -> Any:
        self.listed.append((category, split))
        if category == self.empty:
            return
        for number, label in enumerate((False, True, False)):
            yield Sample(Path(category, split, f"{number}.png"), category, label)

    def in_draw_order(self, samples: Any) -> Any:
        return samples[::-1]

    def spare_masks(self, categories: Any, samples: Any) -> list[Path]:
        return self.spare

    def normal_masks(self, categories: Any, samples: Any) -> list[Path]:
        return []


def listing(source: Any, categories: Any = None, train_categories: Any = "same") -> Listing:
    return Listing(source, categories, train_categories)


def test_categories_have_the_order_of_the_option() -> None:
    assert listing(Source()).categories == ["a", "b", "c"]
    chosen = listing(Source(), ["c", "a"])
    assert chosen.categories == chosen.train_categories == ["c", "a"]
    assert listing(Source(), ["b"], "others").train_categories == ["a", "c"]
    assert listing(Source(), ["b"], ["c", "b"]).train_categories == ["c", "b"]


def test_test_and_training_images_may_be_of_different_categories() -> None:
    chosen = listing(Source(), ["b"], "others")
    assert {sample.category for sample in chosen.samples("test")} == {"b"}
    assert [sample.category for sample in chosen.samples("train")] == ["a"] * 3 + ["c"] * 3


def test_each_category_is_listed_once() -> None:
    source = Source()
    chosen = listing(source)
    first = chosen.samples("train")
    assert chosen.samples("train") is first
    assert chosen.rows("b", "train") == first[3:6]
    assert [sample.image.name for sample in chosen.normal("b")] == ["2.png", "0.png"]
    assert source.listed == [("a", "train"), ("b", "train"), ("c", "train")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["x", "a"],), r"data\.categories: 'x' is not in here \(available: a, b, c\)"),
        ((["a", "b", "a"],), r"data\.categories: 'a' occurs twice"),
        (([],), r"data\.categories: the list is empty"),
        ((None, ["x"]), r"data\.train_categories: 'x' is not in here"),
        ((None, "others"), r"none is left, because data\.categories lists all \(a, b, c\)"),
    ],
)
def test_invalid_categories(arguments: tuple[Any, ...], message: str) -> None:
    chosen = listing(Source(), *arguments)
    with pytest.raises(ValueError, match=message):
        _ = chosen.train_categories


def test_a_split_without_images_is_refused() -> None:
    source = Source(empty="b")
    with pytest.raises(ValueError, match="here: category 'b' has no test images"):
        listing(source).samples("test")
    assert listing(source, ["a", "c"]).samples("test")
    source.splits = ("test",)
    with pytest.raises(ValueError, match="Made has no train images"):
        listing(source).samples("train")


def test_files_are_checked_on_disk_and_masks_in_the_test_split() -> None:
    source = Source()
    source.spare = [Path("m.png")]
    assert len(listing(source).samples("train")) == 9
    with pytest.raises(ValueError, match=r"m\.png: a mask without an image"):
        listing(source).samples("test")
    source.on_disk = True
    with pytest.raises(FileNotFoundError, match=r"0\.png: there is no such file"):
        listing(source).samples("train")
