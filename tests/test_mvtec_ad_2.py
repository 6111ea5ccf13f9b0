from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import save_picture
from layouts import Maker, blob

from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD2


def write_mvtec_ad_2(root: Path, masks: str) -> Path:
    """Write two categories of MVTec AD 2, with their masks in the given folder."""
    make = Maker(2)
    for category in ("can", "walnuts"):
        for name in ("train/good/000_regular", "train/good/001_regular", "validation/good/000"):
            make.picture(root / category / f"{name}.png")
        for name in ("good/000_regular", "bad/000_regular", "bad/001_shift_1"):
            make.picture(root / category / "test_public" / f"{name}.png")
        make.picture(root / category / "test_private" / "000_regular.png")
        for name in ("000_regular", "001_shift_1"):
            save_picture(root / category / masks / "bad" / f"{name}_mask.png", blob())
    return root


@pytest.mark.parametrize("masks", ["test_public/ground_truth", "ground_truth"])
def test_the_public_test_set_is_tested(tmp_path: Path, masks: str) -> None:
    data = MVTecAD2(str(write_mvtec_ad_2(tmp_path, masks)), image_size=16)
    assert data.categories == ["can", "walnuts"]
    assert [s.image.name for s in data.samples("train")] == [
        "000_regular.png",
        "001_regular.png",
    ] * 2
    assert [(s.defect, s.label) for s in data.samples("test")[:3]] == [
        ("bad", True),
        ("bad", True),
        ("good", False),
    ]
    dataset = data.dataset("test")
    with_defects = [bool(dataset[row]["mask"].any()) for row in range(len(dataset))]
    assert with_defects == [True, True, False] * 2


def test_check_and_missing_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mvtec_ad_2(tmp_path, "test_public/ground_truth")
    assert main(["check", "--data=MVTecAD2", f"--data.root={root}"]) == 0
    assert "4 other images are not used" in capsys.readouterr().out  # validation and private tests
    (root / "can/test_public/ground_truth/bad/000_regular_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match="its mask is missing, expected"):
        MVTecAD2(str(root)).samples("test")


def test_another_layout_is_refused(mvtec_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected MVTec AD 2's layout, .*test_public"):
        _ = MVTecAD2(str(mvtec_root)).categories


def test_masks_are_optional(tmp_path: Path) -> None:
    root = write_mvtec_ad_2(tmp_path, "test_public/ground_truth")
    for category in ("can", "walnuts"):
        shutil.rmtree(root / category / "test_public" / "ground_truth")
        if category == "can":
            data = MVTecAD2(str(root), categories=["walnuts", "can"])
            place = r"can[/\\]test_public[/\\]ground_truth[/\\]bad"
            with pytest.raises(FileNotFoundError, match=place):  # walnuts has masks
                data.samples("test")
    data = MVTecAD2(str(root))
    assert not data.has_masks
    assert {sample.mask for sample in data.samples("test")} == {None}
