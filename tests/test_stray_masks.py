"""Masks among images: taken as masks, refused by name, or said."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from field_files import labelled, masks, mvtec, photos, square
from helpers import save_picture
from layouts import ksdd2

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder, MVTecAD, MVTecAD2

EMPTY = np.zeros((40, 40), np.uint8)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plank_folder(**options: Any) -> ImageFolder:
    return ImageFolder("data", "plank", **options)


@pytest.mark.parametrize(
    ("folder", "ending", "named"),
    [
        ("mask", "", "test/mask"),
        ("cut_mask", "", "test/cut_mask"),
        ("annotation", "_mask", "test/annotation"),
        ("cut", "_mask", "test/cut/0_mask.png"),
        ("good", "_gt", "test/good/0_gt.png"),
    ],
)
def test_masks_among_test_images_are_refused(
    folder: str, ending: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mvtec()
    masks(f"data/plate/test/{folder}", ending=ending)
    with pytest.raises(ValueError, match=f"{named}: .* mask.*move"):
        MVTecAD("data").samples("test")
    assert main(["check", "--data=MVTecAD", "--data.root=data"]) == 1
    assert named in capsys.readouterr().out


def test_masks_among_the_images_of_mvtec_ad_2_are_refused() -> None:
    mvtec(with_masks=True)
    Path("data/plate/test").rename("data/plate/test_public")
    assert len(MVTecAD2("data").samples("test")) == 8
    masks("data/plate/test_public/masks")
    with pytest.raises(ValueError, match="test_public/masks: black-and-white images"):
        MVTecAD2("data").samples("test")


def test_photographs_of_such_names_are_test_images() -> None:
    mvtec()
    photos("data/plate/test/label", seed=3)
    save_picture(Path("data/plate/test/cut/0_mask.png"))
    assert len(MVTecAD("data").samples("test")) == 15


@pytest.mark.parametrize("value", [1, 128])
def test_masks_of_any_two_values_are_masks(value: int) -> None:
    labelled()
    masks("data/annot", make=partial(square, value=value))
    data = plank_folder()
    assert len(data.samples("test")) == 12
    assert data.has_masks


@pytest.mark.parametrize("count", [5, 8])
def test_masks_with_the_names_of_normal_images_are_refused(count: int) -> None:
    labelled()
    masks("data/marks", count)
    with pytest.raises(ValueError, match="data/marks: black-and-white images with the names"):
        plank_folder().samples("test")


@pytest.mark.parametrize(
    "options", [{"suffix": "jpg", "quality": 50}, {"ending": "_m"}, {"count": 12}]
)
def test_what_may_be_masks_is_said(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    labelled()
    masks("data/marks", **options)
    data = plank_folder()
    assert any(r.startswith("marks/ (") and "nearly black and white" in r for r in data.remarks)
    main(["check", "--data=ImageFolder", "--data.root=data", "--data.category=plank"])
    assert "nearly black and white" in " ".join(capsys.readouterr().out.split())


def test_masks_of_normal_images_in_a_folder_named_after_them() -> None:
    labelled()
    masks("data/cut_mask")
    masks("data/good_mask", 8, make=EMPTY.copy)
    assert len(plank_folder().samples("test")) == 12
    masks("data/good_mask", 1)
    with pytest.raises(ValueError, match="the mask of a normal image is not empty"):
        plank_folder().samples("test")


@pytest.mark.parametrize("place", ["good", "train/good"])
def test_masks_next_to_normal_images_must_be_empty(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(f"data/{place}", 8)
    if place != "good":
        photos("data/test/good", 2, seed=3)
    cut = "data/test/cut" if place != "good" else "data/cut"
    photos(cut, 2, seed=1)
    masks(cut, 2, ending="_mask")
    save_picture(Path(f"data/{place}/0_mask.png"), EMPTY)
    plank_folder().samples("test")
    save_picture(Path(f"data/{place}/0_mask.png"), square())
    with pytest.raises(ValueError, match=r"0_mask\.png: the mask of a normal image is not empty"):
        plank_folder().samples("test")
    assert main(["check", "--data=ImageFolder", "--data.root=data", "--data.category=plank"]) == 1
    assert "is not empty" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_kolektor_sdd_2_read_as_a_folder(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    ksdd2(Path("data"))
    assert main([verb, "--data=ImageFolder", "--data.root=data", "--data.category=plank"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "this is KolektorSDD2's layout: use --data KSDD2" in message


def test_the_ending_of_masks_without_an_image_is_named() -> None:
    labelled()
    masks("data/ground_truth/cut", ending="-seg")
    with pytest.raises(ValueError, match=r"0-seg\.png: a mask .*set --data\.mask_ending=-seg"):
        plank_folder().samples("test")
    assert plank_folder(mask_ending="-seg").has_masks


def test_masks_of_normal_images_in_the_layout_of_mvtec(capsys: pytest.CaptureFixture[str]) -> None:
    mvtec(with_masks=True)
    place = "data/plate/ground_truth/good"
    masks(place, 6, ending="_mask", make=EMPTY.copy)  # 4 and 5 are training images
    assert len(MVTecAD("data").samples("test")) == 8
    masks(place, 1, ending="_mask")
    with pytest.raises(ValueError, match="the mask of a normal image is not empty"):
        MVTecAD("data").samples("test")
    assert main(["check", "--data=MVTecAD", "--data.root=data"]) == 1
    assert capsys.readouterr().out.count("0_mask.png") == 1
