from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_picture

from anomaly_clip.data import MagneticTile, MVTecAD
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.industrial import list_mvtec


def test_listing_is_sorted_and_pairs_by_name(mvtec_root: Path) -> None:
    samples = MVTecAD(str(mvtec_root)).samples("test")
    assert [s.image for s in samples] == sorted(s.image for s in samples)
    for sample in samples:
        assert sample.label == (sample.defect != "good") == (sample.mask is not None)
        if sample.mask is not None:
            assert sample.mask.stem == f"{sample.image.stem}_mask"
            assert sample.mask.parts[-4] == sample.category


def test_the_training_split_is_normal(mvtec_root: Path) -> None:
    samples = MVTecAD(str(mvtec_root)).samples("train")
    assert len(samples) == 4
    assert not any(s.label for s in samples)


def test_suffixes_in_any_case_and_files_that_are_no_images(mvtec_root: Path) -> None:
    folder = mvtec_root / "bottle" / "test" / "good"
    save_picture(folder / "photo one.jpg").rename(folder / "photo one.JPG")
    for name in ("Thumbs.db", ".DS_Store", "license.txt", "._000.png"):
        (folder / name).write_text("not an image")
    (mvtec_root / "license.txt").write_text("a licence")
    (mvtec_root / ".hidden" / "test").mkdir(parents=True)
    data = MVTecAD(str(mvtec_root))
    assert data.categories == ["bottle", "metal_nut"]
    assert len(data.samples("test")) == 9


def test_categories_are_used_in_the_order_given(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), categories=["metal_nut", "bottle"])
    assert data.categories == ["metal_nut", "bottle"]
    assert data.samples("test")[0].category == "metal_nut"


@pytest.mark.parametrize(
    ("categories", "sentence"),
    [
        (["botle"], r"'botle' is not in .* \(there: bottle, metal_nut\)"),
        (["bottle", "bottle"], "'bottle' occurs twice"),
        ([], "the list is empty"),
    ],
)
def test_categories_that_do_not_fit(mvtec_root: Path, categories: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _ = MVTecAD(str(mvtec_root), categories=categories).categories


def test_a_missing_mask_names_image_and_mask(mvtec_root: Path) -> None:
    (mvtec_root / "bottle" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"scratch/001\.png: its mask is missing, .*001_mask"
    ):
        list(list_mvtec(mvtec_root, "bottle", "test"))


def test_wrong_roots_say_what_was_expected_and_what_is_there(mvtec_root: Path) -> None:
    cases = {
        mvtec_root / "nowhere": "there is no such folder; expected MVTec-AD's layout",
        mvtec_root / "bottle" / "train": "there is good",
        mvtec_root / "bottle": f"this looks like one category: try {mvtec_root}",
        mvtec_root / "bottle" / "train" / "good" / "000.png": "is a file",
    }
    for root, sentence in cases.items():
        with pytest.raises(FileNotFoundError) as error:
            _ = MVTecAD(str(root)).categories
        assert sentence in str(error.value)
        assert str(root) in str(error.value)


def test_an_empty_category_is_named(mvtec_root: Path) -> None:
    shutil.rmtree(mvtec_root / "bottle" / "test")
    (mvtec_root / "bottle" / "test" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="category 'bottle' has no test images"):
        MVTecAD(str(mvtec_root)).samples("test")


@pytest.mark.parametrize(
    ("name", "kind", "train", "test"),
    [
        (
            "mvtec_leather",
            MVTecAD,
            3,
            {"good": 1, "color": 1, "cut": 1, "fold": 1, "glue": 1, "poke": 1},
        ),
        (
            "magnetic_tile",
            MagneticTile,
            763,
            {"good": 189, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 99},
        ),
    ],
)
def test_real_sets_have_their_counts(
    shared_data: Callable[[str], Path],
    name: str,
    kind: type[AnomalyData],
    train: int,
    test: dict[str, int],
) -> None:
    data = kind(str(shared_data(name)), image_size=32)
    assert len(data.samples("train")) == train
    assert Counter(s.defect for s in data.samples("test")) == test
    item = data.dataset("test")[0]
    assert item["image"].shape == (3, 32, 32)
