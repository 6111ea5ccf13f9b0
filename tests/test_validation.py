from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from layouts import Maker

from anomaly_clip.data import (
    AnomalyData,
    Demo,
    MVTecAD,
    SampleDataset,
)
from anomaly_clip.data.synthetic import SyntheticPairs
from anomaly_clip.data.validation import ValidationSplit
from anomaly_clip.synthesis import SynthesisSettings


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def paths(data: AnomalyData) -> list[str]:
    """Return the paths of the validation images."""
    batches: Any = data.val_dataloader()
    return [path for batch in batches for path in batch["path"]]


def test_a_tenth_of_the_auxiliary_set_is_held_out(mvtec_root: Path, tmp_path: Path) -> None:
    make = Maker(11)
    for number in range(20):
        make.picture(tmp_path / "aux" / "nut" / "test" / "good" / f"{number}.png")
    (tmp_path / "aux" / "nut" / "train").mkdir()

    def data(seed: int = 0) -> MVTecAD:
        aux = MVTecAD(str(tmp_path / "aux"))
        more = {"auxiliary": aux, "val_split": "auxiliary", "seed": seed, "num_workers": 0}
        module = MVTecAD(str(mvtec_root), image_size=16, **more)  # type: ignore[arg-type]
        module.setup("fit")
        return module

    first = data()
    held = paths(first)
    trained = [str(s.image) for s in first.fit_samples()]
    assert len(held) == 2
    everything = MVTecAD(str(tmp_path / "aux")).samples("test")
    assert sorted(held + trained) == sorted(str(s.image) for s in everything)
    assert paths(data()) == held
    assert first.validation_categories() == ["nut"]
    with pytest.raises(ValueError, match=r"data\.val_split auxiliary needs an auxiliary data set"):
        MVTecAD(str(mvtec_root), val_split="auxiliary")


def test_the_test_split_can_be_the_validation_split(mvtec_root: Path) -> None:
    data = tiny(mvtec_root, val_split="test")
    data.setup("fit")
    assert paths(data) == [str(s.image) for s in data.samples("test")]
    assert data.protocol()["val_split"] == "test"


BOTH = ["pink pill", "tan leather"]
ERASING = SynthesisSettings("erasing")


def demo(**options: Any) -> Demo:
    sizes = {"picture_size": 64, "image_size": 32, "num_train": 25, "num_test": 11}
    return Demo(**{**sizes, "categories": BOTH, **options})


def test_there_is_no_validation_split_by_default() -> None:
    validation = ValidationSplit(demo(), "none", 0.5)
    assert (validation.exists, validation.is_test, validation.holds_out) == (False, False, False)
    assert validation.dataset() is None
    assert validation.categories == BOTH


def test_val_split_test_uses_all_test_images() -> None:
    data = demo()
    validation = ValidationSplit(data, "test", 0.5)
    assert (validation.exists, validation.is_test, validation.holds_out) == (True, True, False)
    dataset = validation.dataset()
    assert isinstance(dataset, SampleDataset)
    assert list(dataset.samples) == data.samples("test")
    assert (validation.source, validation.categories) == (data, BOTH)


def test_val_split_synthetic_uses_training_images_with_and_without_a_defect() -> None:
    data = demo(
        categories=BOTH[:1],
        train_categories=BOTH,
        val_split="synthetic",
        val_share=0.1,
        synthesis=ERASING,
    )
    validation = data.validation
    assert (validation.exists, validation.is_test, validation.holds_out) == (True, False, True)
    trained, held = validation.normal_parts
    # A tenth of 25 images is 2.5. This is rounded to even, so that each category has two.
    assert Counter(sample.category for sample in held) == dict.fromkeys(BOTH, 2)
    everything = data.samples("train")
    assert sorted([*trained, *held], key=everything.index) == everything
    assert trained == [sample for sample in everything if sample not in held]
    assert data.fit_samples() == trained
    assert validation.categories == BOTH  # the training categories
    assert validation.source is data
    dataset = validation.dataset()
    assert isinstance(dataset, SyntheticPairs)
    assert len(dataset) == 2 * len(held)
    assert [dataset[row]["path"] for row in range(4)] == [str(held[0].image)] * 2 + [
        str(held[1].image)
    ] * 2
    assert set(dataset.defects.donors.samples) == set(trained)  # no held-out image is a donor


def test_val_split_auxiliary_holds_out_a_fraction_per_category_and_label() -> None:
    auxiliary = demo(seed=1)
    validation = ValidationSplit(demo(auxiliary=auxiliary), "auxiliary", 0.3)
    assert (validation.exists, validation.is_test, validation.holds_out) == (True, False, True)
    assert validation.source is auxiliary
    trained, held = validation.auxiliary_parts
    # 0.3 of 6 normal images is 1.8, and 0.3 of 5 anomalous ones is 1.5: 2 each when rounded.
    expected = {(category, label): 2 for category in BOTH for label in (False, True)}
    assert Counter((sample.category, sample.label) for sample in held) == expected
    everything = auxiliary.samples("test")
    assert trained == [sample for sample in everything if sample not in held]
    dataset = validation.dataset()
    assert isinstance(dataset, SampleDataset)
    assert list(dataset.samples) == held
    other = ValidationSplit(demo(auxiliary=auxiliary, seed=2), "auxiliary", 0.3)
    assert other.auxiliary_parts[1] != held


def test_val_split_test_leaves_the_whole_auxiliary_set_for_training() -> None:
    auxiliary = demo(seed=1)
    validation = ValidationSplit(demo(auxiliary=auxiliary), "test", 0.3)
    assert validation.auxiliary_parts == (auxiliary.samples("test"), [])


def test_too_few_images_to_hold_any_out_are_refused() -> None:
    few = demo(num_train=4, num_test=4, synthesis=ERASING, auxiliary=None)
    with pytest.raises(ValueError, match=r"8 normal images are too few to hold 0\.1 of each"):
        _ = ValidationSplit(few, "synthetic", 0.1).normal_parts
    with pytest.raises(
        ValueError, match=r"4 images are too few to hold 0\.1 of each category and class out"
    ):
        _ = ValidationSplit(
            demo(auxiliary=demo(num_test=4, categories=BOTH[:1])), "auxiliary", 0.1
        ).auxiliary_parts


@pytest.mark.parametrize(
    ("kind", "share", "message"),
    [
        ("synthetic", 0.1, r"data\.val_split synthetic needs synthetic defects"),
        ("auxiliary", 0.1, r"data\.val_split auxiliary needs an auxiliary data set"),
        ("none", 0.0, r"data\.val_share must be in \(0, 1\), got 0.0"),
        ("none", 1.0, r"data\.val_share must be in \(0, 1\), got 1.0"),
    ],
)
def test_invalid_validation_settings(kind: Any, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValidationSplit(demo(), kind, share)
