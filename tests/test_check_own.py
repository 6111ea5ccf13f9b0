"""``check`` of a user's own data: no published data set is expected, and every mistake is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from layouts import Maker, blob, visa
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD, VisA


@pytest.fixture
def plank(tmp_path: Path) -> Path:
    """Return a user's own category in MVTec-AD's layout."""
    return write_category(tmp_path / "own", "plank")


def write_category(root: Path, category: str, seed: int = 0) -> Path:
    make = Maker(seed)
    for name in ("train/good/a", "train/good/b", "test/good/c", "test/cut/d"):
        make.picture(root / category / f"{name}.png")
    save_picture(root / category / "ground_truth" / "cut" / "d_mask.png", blob())
    return root


def check(root: Path, *words: str, data: str = "MVTecAD") -> tuple[int, dict[str, Any]]:
    report = root.parent / "report.json"
    code = main(["check", f"--data={data}", f"--data.root={root}", f"--json={report}", *words])
    return code, json.loads(report.read_text())


def test_own_data_in_a_published_layout(plank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check(plank)
    out = capsys.readouterr().out
    assert (code, report["problems"], report["published"]) == (0, [], False)
    assert "checked as your own data in this layout" in out
    assert "bottle" not in out
    assert "CC BY-NC-SA" not in out


def test_one_category_with_a_published_name_is_own_data(tmp_path: Path) -> None:
    root = write_category(tmp_path / "own", "bottle")
    assert check(root)[0] == 0
    write_category(root, "plank", 1)
    assert check(root)[0] == 0
    write_category(root, "cable", 2)  # two published names
    code, report = check(root)
    assert code == 1
    assert report["published"]
    messages = [problem["message"] for problem in report["problems"]]
    assert "the published category capsule is missing" in messages
    assert "plank: not a published category" in report["remarks"]
    assert MVTecAD(str(root), categories=["plank"]).is_published


def test_the_table_of_visa_is_that_of_the_published_set(tmp_path: Path) -> None:
    assert VisA(str(visa(tmp_path / "a"))).is_published
    root = visa(tmp_path / "b", split_file=False)
    assert VisA(str(root)).is_published  # two published names
    shutil.rmtree(root / "candle")
    assert not VisA(str(root)).is_published


def problems_of(root: Path) -> set[tuple[str, str]]:
    return {(problem["kind"], problem["path"]) for problem in check(root)[1]["problems"]}


def test_every_mistake_is_named_by_its_file(plank: Path) -> None:
    folder, make = plank / "plank", Maker(7)
    (folder / "test/good/cut_short.png").write_bytes(
        (folder / "test/good/c.png").read_bytes()[:-200]
    )
    pages = [Image.fromarray(np.full((9, 9), value, np.uint8)) for value in (1, 2)]
    pages[0].save(folder / "train/good/pages.tif", save_all=True, append_images=pages[1:])
    with Image.open(folder / "train/good/a.png") as image:
        image.save(folder / "test/good/again.bmp")  # a leak
    with Image.open(folder / "test/good/c.png") as image:
        image.save(folder / "test/cut/c2.bmp")  # a contradiction
    save_picture(folder / "ground_truth/cut/c2_mask.png", blob())
    save_picture(folder / "ground_truth/cut/none_mask.png", blob())
    save_picture(folder / "ground_truth/good/c_mask.png", blob())
    shutil.copy(make.picture(folder / "x.png"), folder / "train/good/y.jpg")
    assert problems_of(plank) == {
        ("unreadable", "plank/test/good/cut_short.png"),
        ("frames", "plank/train/good/pages.tif"),
        ("leak", "plank/test/good/again.bmp"),
        ("contradiction", "plank/test/good/c.png"),
        ("mask", "plank/ground_truth/cut/none_mask.png"),
        ("mask of normal", "plank/ground_truth/good/c_mask.png"),
        ("extension", "plank/train/good/y.jpg"),
    }


def test_what_is_not_used_is_no_problem_but_said(
    plank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, make = plank / "plank", Maker(8)
    shutil.copy(folder / "test/cut/d.png", folder / "test/cut/d (1).png")
    for number in range(2):
        make.picture(folder / "train" / "cut" / f"{number}.png")
    make.picture(plank / "note.png")
    make.picture(plank / "runs" / "1" / "maps" / "a.png")
    (plank / "runs" / "1" / "config-test.yaml").write_text("")
    code, report = check(plank)
    assert (code, report["problems"]) == (0, [])
    assert (report["copies"], report["unused"]) == (["plank/test/cut/d (1).png"], ["note.png"])
    out = capsys.readouterr().out
    assert (
        "1 file not used, as the content is that of the original: plank/test/cut/d (1).png" in out
    )
    assert "2 defective training images are not used, such as plank/train/cut/0.png" in out
    assert "1 folder of results not read, such as runs/1" in out
    assert "1 other images are not used, such as note.png" in out
    line = MVTecAD(str(plank)).summary("fit")
    assert "2 defective training images are not used, such as plank/train/cut/0.png" in line


FORMS = {
    "flat": (["a", "b"], "2 images without labels, because no folder is called good"),
    "good only": (["good/a", "good/b"], "good/ (2) is normal, no folder is defective"),
    "labelled": (["OK/a", "NG/b"], "OK/ (1) is normal, NG/ (1) defective, there are no masks"),
    "train": (["train/good/a", "test/good/b"], "train/good/ contains the 1 training images"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_described(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, sentence = FORMS[form]
    make = Maker()
    for name in names:
        make.picture(tmp_path / "own" / f"{name}.png")
    code, report = check(tmp_path / "own", data="ImageFolder")
    assert (code, report["problems"]) == (0, [])
    out = capsys.readouterr().out
    assert sentence in out
    assert ("2 without labels" in out) == (form == "flat")


def test_masks_of_normal_images_of_a_folder(tmp_path: Path) -> None:
    root, make = tmp_path / "own", Maker()
    for name in ("good/a", "cut/b"):
        make.picture(root / f"{name}.png")
    for name in ("cut/b", "good/a"):
        save_picture(root / "ground_truth" / f"{name}_mask.png", blob())
    _, report = check(root, data="ImageFolder")
    [problem] = report["problems"]
    assert problem["message"] == "the mask of a normal image is not empty"
    assert problem["path"] == "ground_truth/good/a_mask.png"
