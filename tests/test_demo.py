from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from anomaly_clip.data import Demo
from anomaly_clip.demo.photographs import CATEGORIES, NAME_OF_WORDS, draw_photograph
from anomaly_clip.demo.surfaces import fitting_defects

WORDS = ["oak wood board", "steel washer"]


def test_a_listing_without_files() -> None:
    data = Demo(categories=WORDS, num_train=3, num_test=20, picture_size=64, image_size=32)
    assert [s.category for s in data.samples("train")] == [WORDS[0]] * 3 + [WORDS[1]] * 3
    samples = data.samples("test")
    assert Counter((s.category, s.label) for s in samples) == {
        (name, label): 10 for name in WORDS for label in (False, True)
    }
    kinds = {s.defect for s in samples if s.category == WORDS[0]} - {"good"}
    assert kinds == set(fitting_defects(CATEGORIES["oak"]))
    assert len({s.image for s in samples}) == len(samples)
    assert not any(s.image.exists() for s in samples)


def test_items_are_the_generated_images() -> None:
    data = Demo(categories=WORDS, num_test=20, picture_size=64, image_size=64, seed=5)
    dataset, samples = data.dataset("test"), data.samples("test")
    for index in (0, 13):
        item, sample = dataset[index], samples[index]
        number = int(sample.image.stem)
        photo = draw_photograph(NAME_OF_WORDS[sample.category], 5, number, sample.defect, 64)
        assert torch.equal(item["image"].permute(1, 2, 0), torch.from_numpy(photo.image))
        assert torch.equal(item["mask"], torch.from_numpy(photo.mask))
        assert item["mask"].any() == sample.label


def test_another_seed_and_another_split_give_other_images() -> None:
    def first(split: str, seed: int) -> torch.Tensor:
        data = Demo(categories=WORDS, num_test=4, picture_size=64, image_size=64, seed=seed)
        return data.dataset(split)[0]["image"]  # type: ignore[arg-type]

    images = [first("test", 0), first("test", 1), first("train", 0)]
    assert torch.equal(first("test", 0), images[0])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_all_category_names_are_distinct() -> None:
    assert len(NAME_OF_WORDS) == len(CATEGORIES)
    assert Demo(image_size=32).categories == sorted(c.words for c in CATEGORIES.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_test": 0}, "data.num_test must be 1 or more"),
        ({"picture_size": 32}, "data.picture_size must be 64 or more"),
        ({"seed": -1}, "data.seed must be 0 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Demo(**options)


def test_an_unknown_category_is_reported_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'oak' is not in demo-0 \(available: .*oak wood board"):
        _ = Demo(categories=["oak"]).categories


def test_an_auxiliary_set_of_the_same_images_is_rejected() -> None:
    options: dict[str, Any] = {"categories": ["steel nut"], "num_test": 4, "image_size": 32}
    same = Demo(**options, auxiliary=Demo(**options))
    assert len(same.overlap()) == 4
    with pytest.raises(ValueError, match="4 test images are among the training images"):
        same.setup("fit")
    assert Demo(**options, auxiliary=Demo(**options, seed=1)).overlap() == []
    assert Demo(**options).overlap() == []
