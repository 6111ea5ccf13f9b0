from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.data.base import BaseDataModule
from anomaly_clip.data.file_hashes import DuplicatePair
from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.samples import Reader, Sample, Split
from anomaly_clip.images import MAX_PIXELS, ReadRule


class Plain(BaseDataModule):
    """A data set that defines only the abstract members."""

    dataset_name: ClassVar[str] = "CVCClinicDB"
    reading: Any = SimpleNamespace(rule=ReadRule(), max_pixels=MAX_PIXELS)

    def find_categories(self) -> list[str]:
        return ["a"]

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        yield Sample(Path("1.png"), category, False)


class InMemory(Plain):
    """A data set of generated images that depend on the first letter of the sample's name."""

    @property
    def on_disk(self) -> bool:
        return False

    def reader(self) -> Reader:
        return lambda sample: (np.full((2, 2, 3), ord(sample.image.name[0]), np.uint8), None)


def samples(*names: str) -> list[Sample]:
    return [Sample(Path(name), "a", False) for name in names]


def test_defaults_of_a_data_set() -> None:
    data = Plain()
    assert (data.has_masks, data.has_labels, data.on_disk) == (True, True, True)
    assert (data.splits, data.targets, data.target_names) == (("train", "test"), None, [])
    assert data.info.title == "CVC-ClinicDB"
    assert data.mask_folders("a") == []
    with pytest.raises(TypeError, match="abstract"):
        BaseDataModule()  # type: ignore[abstract]


def test_the_reader_follows_the_rule_of_the_data_set(tmp_path: Path) -> None:
    grey = np.zeros((40, 40), np.uint8)
    grey[3, 4] = 100
    image, mask = save_picture(tmp_path / "i.png"), save_picture(tmp_path / "m.png", grey)
    sample = Sample(image, "a", True, mask)
    assert Plain().info.mask == MaskRule(grey=True)
    _, read = Plain().reader()(sample)
    assert read is not None
    assert (read.dtype, read[3, 4], read.sum()) == (np.uint8, 100, 100)


def test_masks_of_no_sample_are_spare(tmp_path: Path) -> None:
    class WithFolders(Plain):
        def mask_folders(self, category: str) -> list[Path]:
            return [tmp_path / category]

    first_mask, second_mask = (save_picture(tmp_path / "a" / f"{n}.png", size=2) for n in (1, 2))
    third_mask = save_picture(tmp_path / "b" / "3.png", size=2)
    listed = [Sample(Path("1.png"), "a", True, first_mask), *samples("2.png")]
    assert WithFolders().spare_masks(["a"], listed) == [second_mask]
    assert WithFolders().spare_masks(["a", "b", "c"], listed) == [second_mask, third_mask]


@pytest.mark.parametrize("on_disk", [True, False])
def test_duplicates_are_found_by_content(tmp_path: Path, on_disk: bool) -> None:
    names = [["x1", "y1", "x2"], ["y2", "z1", "x3", "y3"]]
    if on_disk:
        for name in (name for part in names for name in part):
            image = Image.fromarray(np.full((4, 4), ord(name[0]), np.uint8))
            image.save(tmp_path / name, "PNG")
    first, second = ([Sample(tmp_path / name, "a", False) for name in part] for part in names)
    pairs = (Plain() if on_disk else InMemory()).duplicates(first, second)
    # A pair names the first of several equal images.
    expected = [("y1", "y2"), ("x1", "x3"), ("y1", "y3")]
    assert pairs == [DuplicatePair(tmp_path / a, tmp_path / b) for a, b in expected]
