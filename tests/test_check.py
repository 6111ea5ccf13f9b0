from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture
from layouts import Maker, blob, brain_mri, btad, head_ct, ksdd2, visa
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import BTAD, KSDD2, BrainMRI, HeadCT, ImageFolder, MVTecAD, VisA
from anomaly_clip.data.check import CheckReport, check_data
from anomaly_clip.data.info import DATASETS, Counts


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """Return a user's labelled folder with masks, for which no counts are published."""
    make = Maker()
    root = tmp_path / "own"
    for name in ("good/a", "good/b", "cut/c", "cut/d"):
        make.picture(root / f"{name}.png")
    for name in ("c", "d"):
        save_picture(root / "ground_truth" / "cut" / f"{name}_mask.png", blob())
    return root


def check(root: Path) -> CheckReport:
    return check_data(ImageFolder(str(root), "plank"))


def kinds(checked: CheckReport) -> dict[str, str]:
    return {problem.kind: f"{problem.path}: {problem.message}" for problem in checked.problems}


def test_a_set_without_faults(own_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--data", "ImageFolder", "--data.root", str(own_root)]
    assert main([*words, "--data.category", "plank"]) == 0
    out, err = capsys.readouterr()
    assert "no problems found" in out
    assert re.search(r"^duplicates: 0$", out, re.MULTILINE)
    assert re.search(r"4 images in .* s, \d+ per second", err)
    row = check(own_root).rows[0]
    assert (row.normal, row.anomalous, row.sizes, row.modes) == (2, 2, "24 x 20", {"RGB": 4})


def test_each_kind_of_problem_is_reported_with_its_path(own_root: Path) -> None:
    (own_root / "good" / "a.png").write_bytes(b"")
    whole = (own_root / "good" / "b.png").read_bytes()
    (own_root / "good" / "half.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(own_root / "good" / "b.png", own_root / "good" / "lying.jpg")
    shutil.copy(own_root / "cut" / "c.png", own_root / "good" / "other label.png")
    Maker(5).picture(own_root / "cut" / "e.png")
    masks = own_root / "ground_truth" / "cut"
    save_picture(masks / "c_mask.png", np.zeros((20, 24), np.uint8))
    save_picture(masks / "d_mask.png", blob((30, 20)))
    save_picture(masks / "nobody_mask.png", blob())
    problems_by_kind = kinds(check(own_root))
    assert problems_by_kind.keys() == {
        "unreadable", "extension", "twin", "contradiction", "mask missing", "mask empty",
        "mask size", "mask",
    }  # fmt: skip
    unreadable = [p for p in check(own_root).problems if p.kind == "unreadable"]
    assert {p.path for p in unreadable} == {"good/a.png", "good/half.png"}
    assert "an empty file" in str(unreadable)
    assert problems_by_kind["extension"] == (
        "good/lying.jpg: the extension does not match the content, a PNG file"
    )
    assert problems_by_kind["twin"] == "good/lying.jpg: same content as good/b.png"
    assert problems_by_kind["contradiction"] == (
        "good/other label.png: same content as cut/c.png, which has the opposite label"
    )
    assert problems_by_kind["mask missing"] == (
        f"cut/e.png: its mask is missing, expected e_mask.png (or e.png, e_gt.png, e_label.png) in "
        f"{masks}; there are c_mask.png, d_mask.png, nobody_mask.png: add the mask, or set "
        f"data.mask_ending if its name ends differently"
    )
    assert problems_by_kind["mask empty"].startswith("ground_truth/cut/c_mask.png: ")
    assert "30 x 20 pixels, but its image d.png is 24 x 20" in problems_by_kind["mask size"]
    assert problems_by_kind["mask"] == "ground_truth/cut/nobody_mask.png: a mask without an image"


def test_counts_are_compared_with_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    visa(tmp_path)
    counts = {"candle": Counts(2, 1, 2), "pipe_fryum": Counts(2, 1, 3), "cashew": Counts(1, 1, 1)}
    monkeypatch.setitem(DATASETS, "VisA", DATASETS["VisA"].__class__("", "", "", "", counts))
    problems = check_data(VisA(str(tmp_path))).problems
    assert [p.message for p in problems] == [
        "pipe_fryum, test: 1 normal and 2 anomalous images, published: 1 and 3",
        "the published category cashew is missing",
    ]
    assert main(["check", "--data", "VisA", "--data.root", str(tmp_path)]) == 1
    assert re.search(r"pipe_fryum +test +1 +2 of 3", capsys.readouterr().out)
    # With one category requested, the others are not reported as missing.
    assert check_data(VisA(str(tmp_path), categories=["candle"])).problems == []


def test_training_images_in_the_test_split(mvtec_root: Path) -> None:
    train = mvtec_root / "bottle" / "train" / "good" / "000.png"
    shutil.copy(train, mvtec_root / "bottle" / "test" / "good" / "009.png")
    leaks = [p for p in check_data(MVTecAD(str(mvtec_root))).problems if p.kind == "leak"]
    assert [(p.path, p.message) for p in leaks] == [
        (
            "bottle/test/good/009.png",
            "same content as bottle/train/good/000.png, a train image: the same image is trained "
            "on and tested",
        )
    ]


def test_near_duplicates_across_splits(mvtec_root: Path) -> None:
    smooth = np.linspace(0, 200, 40 * 48 * 3).reshape(40, 48, 3).astype(np.uint8)
    save_picture(mvtec_root / "bottle" / "train" / "good" / "005.png", smooth)
    save_picture(mvtec_root / "bottle" / "test" / "good" / "006.png", smooth + 3)
    data = MVTecAD(str(mvtec_root))
    remark, other = (r for r in check_data(data, near_duplicates=True).remarks if "nearly" in r)
    assert other == "metal_nut: 0 test images nearly equal a training image"
    assert remark.startswith("bottle: 1 test images nearly equal a training image")
    assert "test/good/006.png and bottle/train/good/005.png" in remark
    assert not any("nearly" in r for r in check_data(data).remarks)


def test_masks_that_are_off_by_a_few_pixels_are_counted(tmp_path: Path) -> None:
    checked = check_data(KSDD2(str(ksdd2(tmp_path))))
    assert "4 masks differ in size from their image by up to 2 pixels" in " ".join(checked.remarks)
    assert not any("mask" in problem.kind for problem in checked.problems)


def test_a_half_extracted_archive(tmp_path: Path) -> None:
    btad(tmp_path)
    shutil.rmtree(tmp_path / "02" / "test" / "ok")
    shutil.rmtree(tmp_path / "03" / "ground_truth")
    shutil.rmtree(tmp_path / "01" / "train")
    problems = check_data(BTAD(str(tmp_path))).problems
    missing = [p.path for p in problems if p.kind == "mask missing"]
    assert missing == ["03/test/ko/0000.bmp", "03/test/ko/0001.bmp"]
    messages = " ".join(p.message for p in problems if p.kind == "count")
    assert "01, train: 0 normal" in messages
    assert "02, test: 0 normal and 2 anomalous" in messages


def test_a_table_that_cannot_be_read_is_a_problem_of_its_category(tmp_path: Path) -> None:
    head_ct(tmp_path)
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n0, perhaps\n")
    listing = [p for p in check_data(HeadCT(str(tmp_path))).problems if p.kind == "listing"]
    assert "line 2: expected a number and 0 or 1" in listing[0].message


def test_missing_and_unlisted_images(tmp_path: Path) -> None:
    head_ct(tmp_path)
    (tmp_path / "head_ct" / "100.png").unlink()
    save_picture(tmp_path / "head_ct" / "150.png")
    checked = check_data(HeadCT(str(tmp_path)))
    assert ("missing", "head_ct/100.png", "there is no such file") in checked.problems
    assert "1 other images are not used, such as head_ct/150.png" in checked.remarks


def test_generated_images_are_checked_too() -> None:
    from anomaly_clip.data import Demo

    data = Demo(categories=["oak wood board"], num_train=2, num_test=2, picture_size=64)
    checked = check_data(data)
    assert checked.problems == []
    assert [(r.split, r.normal, r.anomalous) for r in checked.rows] == [
        ("train", 2, 0),
        ("test", 1, 1),
    ]


def test_the_real_brain_mri(
    shared_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = shared_data("brain_mri")
    assert main(["check", "--data", "BrainMRI", "--data.root", str(root)]) == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "duplicates" in line)
    assert line.startswith("duplicates: 25 ")
    reported = {Path(p).name for p in re.findall(r"  (.+): the extension does not match", out)}
    by_content = set()
    for path in (root / "brain_tumor_dataset").rglob("*"):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(path) as picture:
                if picture.format != "JPEG":
                    by_content.add(path.name)
    assert reported == by_content
    assert len(reported) == 6


def test_half_of_the_real_head_ct_is_missing(shared_data: Callable[[str], Path]) -> None:
    checked = check_data(HeadCT(str(shared_data("head_ct"))))
    assert [p.message for p in checked.problems] == [
        "head ct, test: 50 normal and 50 anomalous images, published: 100 and 100"
    ]
    assert checked.rows[0].modes == {"RGB": 93, "RGBA": 7}
    assert checked.rows[0].sizes == "134-614 x 135-708"


def test_brain_mri_counts_files_beyond_the_first(tmp_path: Path) -> None:
    root = brain_mri(tmp_path)
    folder = root / "brain_tumor_dataset"
    shutil.copy(folder / "yes" / "Y1.jpg", folder / "yes" / "Y5.jpg")
    checked = check_data(BrainMRI(str(root)))
    assert (checked.duplicates, checked.groups) == (2, 1)


def test_a_mask_that_two_images_claim(own_root: Path) -> None:
    Maker(6).picture(own_root / "cut" / "c.jpg")
    message = "ground_truth/cut/c_mask.png: the mask of two images, c.jpg and c.png"
    assert kinds(check(own_root))["mask"] == message


def test_masks_in_a_folder_without_images(own_root: Path) -> None:
    save_picture(own_root / "ground_truth" / "hole" / "1_mask.png", blob())
    assert kinds(check(own_root))["mask"] == (
        "ground_truth/hole/1_mask.png: a mask without an image"
    )


def test_a_lossy_mask_is_judged_by_its_content(own_root: Path) -> None:
    folder = own_root / "ground_truth" / "cut"
    (folder / "c_mask.png").unlink()
    save_picture(folder / "c_mask.jpg", blob())
    message = kinds(check(own_root))["mask grey"]
    assert message.startswith("ground_truth/cut/c_mask.jpg: 1 of 2 masks have grey values")
    assert "set data.mask_level 127" in message
    level = check_data(ImageFolder(str(own_root), "plank", mask_level=127))
    assert level.problems == []
    blocks = np.zeros((24, 24), np.uint8)
    blocks[8:16, :8] = 255  # whole blocks of 8 x 8 pixels, which JPEG keeps as they are
    save_picture(folder / "c_mask.jpg", blocks[:20])
    assert check(own_root).problems == []


def test_masks_of_normal_images_of_ksdd2_are_checked(tmp_path: Path) -> None:
    root = ksdd2(tmp_path)
    save_picture(root / "test" / "20000_GT.png", np.zeros((3, 3), np.uint8))
    save_picture(root / "test" / "29999_GT.png", blob())
    problems = check_data(KSDD2(str(root))).problems
    assert {p.path for p in problems if p.kind == "mask size"} == {"test/20000_GT.png"}
    assert {p.path for p in problems if p.kind == "mask"} == {"test/29999_GT.png"}


def test_visa_without_its_split_file_may_be_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visa(tmp_path, split_file=False)
    counts = {name: Counts(2, 1, 2) for name in ("candle", "pipe_fryum")}
    monkeypatch.setitem(DATASETS, "VisA", DATASETS["VisA"].__class__("", "", "", "", counts))
    checked = check_data(VisA(str(tmp_path)))
    assert checked.problems == []
    assert "candle: all images are test images, which is not the published protocol" in (
        checked.remarks
    )


def test_a_custom_data_set_in_a_published_layout(tmp_path: Path) -> None:
    make = Maker(12)
    for name in ("train/good/a", "test/good/b"):
        make.picture(tmp_path / "plank" / f"{name}.png")
    checked = check_data(MVTecAD(str(tmp_path)))
    assert checked.problems == []
    assert checked.remarks == [
        "checked as your own data in this layout: fewer than two of the categories of MVTec-AD are "
        "here"
    ]


def test_near_duplicates_without_training_images(tmp_path: Path) -> None:
    root = brain_mri(tmp_path)
    smooth = np.linspace(0, 200, 40 * 48 * 3).reshape(40, 48, 3).astype(np.uint8)
    for number in (7, 8):
        path = root / "brain_tumor_dataset" / "yes" / f"Y{number}.png"
        save_picture(path, smooth + number)
    (remark,) = (
        r for r in check_data(BrainMRI(str(root)), near_duplicates=True).remarks if "nearly" in r
    )
    assert remark.startswith("brain ct: 2 test images nearly equal another test image")


def test_a_category_that_cannot_be_listed_has_no_spare_masks(tmp_path: Path) -> None:
    visa(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,split,label,image,mask\nx,y\n")
    reported = {problem.kind for problem in check_data(VisA(str(tmp_path))).problems}
    assert "listing" in reported
    assert "mask" not in reported


@pytest.mark.parametrize(("pixels", "expected"), [(0, set()), (1, {"mask size"})])
def test_a_mask_has_the_size_of_its_image(pixels: int, expected: set[str], own_root: Path) -> None:
    save_picture(own_root / "ground_truth" / "cut" / "c_mask.png", blob((24 + pixels, 20)))
    assert kinds(check(own_root)).keys() == expected


def test_a_published_tolerance_of_masks_is_kept_to_the_pixel(tmp_path: Path) -> None:
    """Masks of KSDD2 may differ in size from their images by up to 16 pixels."""
    root = ksdd2(tmp_path)
    at, above = (root / "train" / f"1000{number}_GT.png" for number in (0, 1))
    save_picture(at, np.zeros((63 - 16, 23), np.uint8))
    save_picture(above, np.zeros((63, 23 + 17), np.uint8))
    checked = check_data(KSDD2(str(root)))
    wrong = [problem.path for problem in checked.problems if problem.kind == "mask size"]
    assert wrong == ["train/10001_GT.png"]
    remarks = " ".join(checked.remarks)
    assert "3 masks differ in size from their image by up to 16 pixels" in remarks


def test_the_nearest_of_several_near_duplicates_is_named(tmp_path: Path) -> None:
    make = Maker(5)
    good = tmp_path / "nut" / "train" / "good"
    test = tmp_path / "nut" / "test" / "good"
    for number, amplitude in enumerate((6, 2, 4)):  # the second image is the nearest
        array = np.array(Image.open(make.picture(good / f"{number}.png")).convert("RGB"), float)
        noise = np.random.default_rng(number).uniform(-amplitude, amplitude, array.shape)
        near = np.rint(array + noise).clip(0, 255).astype(np.uint8)
        save_picture(test / f"{number}.png", near)
    remark = next(
        r for r in check_data(MVTecAD(str(tmp_path)), near_duplicates=True).remarks if "nearly" in r
    )
    assert "nut: 3 test images nearly equal a training image" in remark
    assert "the closest are nut/test/good/1.png and nut/train/good/1.png" in remark
