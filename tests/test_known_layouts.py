"""Published data sets that are not supported, and folders that another option would read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import save_picture, write_mvtec
from layouts import (
    Maker,
    blob,
    brain_mri,
    btad,
    clinic_db,
    dagm,
    eyecandies,
    head_ct,
    isic,
    kolektor_sdd,
    ksdd2,
    loco,
    mvtec_3d,
    visa,
)

from anomaly_clip.cli import main
from anomaly_clip.data.known_layouts import layout_hint, unsupported

UNSUPPORTED = {
    "MVTec LOCO AD": (loco, "breakfast_box", "sPRO, are not supported"),
    "KolektorSDD": (kolektor_sdd, "kos01", "is not supported, because only the masks"),
    "MVTec 3D-AD": (mvtec_3d, "bagel", "point clouds (xyz/) is not supported"),
    "Eyecandies": (eyecandies, "CandyCane", "is not supported: copy one image"),
    "DAGM 2007": (dagm, "Class1", "is not supported: copy the images"),
}
MODULES = ["MVTecAD", "KSDD2", "VisA", "BTAD", "MVTecAD2", "MetaJSON", "RealIAD", "ImageFolder"]
MODULES += ["IndustrialFolders", "HeadCT", "BrainMRI", "ISIC", "CVCClinicDB", "MagneticTile"]
PADIM = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
PADIM += ["--trainer.accelerator=cpu", "--output.folder=run"]


def words_of(module: str, root: Path) -> list[str]:
    """Return a command line of PaDiM without its verb."""
    return [*PADIM, f"--data={module}", f"--data.root={root}", "--data.num_workers=0"]


@pytest.mark.parametrize("title", UNSUPPORTED)
@pytest.mark.parametrize("level", [-1, 0, 1])
def test_unsupported_sets_are_named_by_every_data_module(
    title: str, level: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, category, reason = UNSUPPORTED[title]
    root = make(tmp_path / "above" / "set")
    root = {-1: root.parent, 0: root, 1: root / category}[level]
    for module in MODULES:
        assert main(["check", f"--data={module}", f"--data.root={root}"]) == 2, module
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert f"data.root {root}: this " in line
        assert f" {title}; " in line
        assert reason in line


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "test", "predict", "each"])
@pytest.mark.parametrize("make", [loco, kolektor_sdd])
def test_unsupported_sets_are_named_by_every_verb(
    verb: str,
    make: Callable[[Path], Path],
    tiny_sdp: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make(tmp_path / "set")
    model = [word for word in tiny_sdp if not word.startswith("--data")]
    model += ["--trainer.max_epochs=1"]
    for module in ("MVTecAD", "ImageFolder", "KSDD2"):
        if verb in ("fit", "each"):
            model = PADIM
        elif (verb, module) == ("predict", "ImageFolder"):
            continue  # scores need neither labels nor masks
        assert main([verb, *model, *words_of(module, root)[-3:]]) == 2
        error = capsys.readouterr().err
        assert "MVTec LOCO AD" in error or "KolektorSDD" in error
        assert "not supported" in error
        assert "use --data" in error


def test_images_of_any_set_can_be_scored(
    tiny_sdp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = kolektor_sdd(tmp_path / "set")
    words = [word for word in tiny_sdp if not word.startswith("--data")]
    words += ["--data=ImageFolder", f"--data.root={root}", "--data.category=part"]
    assert main(["predict", *words, "--data.num_workers=0"]) == 0
    output = capsys.readouterr().err
    assert "4 images (no labels)" in output
    assert "this is KolektorSDD" in output


@pytest.mark.slow
def test_the_way_out_of_loco_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = loco(tmp_path / "set")
    for folder in root.glob("*/ground_truth"):
        shutil.move(folder, tmp_path / folder.parent.name)
    assert main(["each", *words_of("MVTecAD", root)]) == 0


def test_supported_sets_are_not_taken_for_unsupported_ones(tmp_path: Path) -> None:
    for number, make in enumerate((visa, btad, ksdd2, isic, clinic_db, head_ct, brain_mri)):
        root = make(tmp_path / f"{number}")
        assert unsupported(root) is None
        assert all(unsupported(folder) is None for folder in root.iterdir())
    assert unsupported(write_mvtec(tmp_path)) is None
    assert unsupported(tmp_path / "nowhere") is None


def test_own_folders_below_a_kind_of_defect_are_not_loco(tmp_path: Path) -> None:
    make = Maker()
    for folder in (tmp_path, tmp_path / "test"):
        for name in ("good/cam1/Part0", "bad/cam1/Part0", "bad/cam2/Part1"):
            make.picture(folder / f"{name}.png")
        save_picture(folder / "bad" / "cam2" / "Part1_label.png", blob())
    for name in ("cam1/Part0", "cam2/Part1"):
        save_picture(tmp_path / "ground_truth" / "bad" / f"{name}_mask.png", blob())
    assert unsupported(tmp_path) is None


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "MVTecAD": (write_mvtec, "mvtec/bottle"),
    "VisA": (visa, "candle"),
    "BTAD": (btad, "01"),
    "KSDD2": (ksdd2, "train"),
    "HeadCT": (head_ct, "head_ct"),
    "BrainMRI": (brain_mri, "brain_tumor_dataset"),
    "CVCClinicDB": (clinic_db, "Original"),
}


@pytest.mark.parametrize("module", FOLDERS)
def test_a_root_that_is_a_level_too_high_or_too_low(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, part = FOLDERS[module]
    top = tmp_path / "a" / "b"
    make(top)
    root = top / "mvtec" if module == "MVTecAD" else top
    for wrong in (top / part, root.parent, root.parent.parent):
        assert main(["check", f"--data={module}", f"--data.root={wrong}"]) == 2
        error = capsys.readouterr().err
        assert f"try {root}" in error
        assert "expected" in error


@pytest.mark.parametrize("module", FOLDERS)
def test_another_data_module_is_named(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, _ = FOLDERS[module]
    root = make(tmp_path / "set")
    hint = f"try --data {module}"
    assert hint in (layout_hint(root) or "")
    assert main(["check", "--data=RealIAD", f"--data.root={root}"]) == 2
    assert hint in capsys.readouterr().err


def test_a_folder_of_published_categories_is_no_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_mvtec(tmp_path)
    assert main(["fit", *words_of("ImageFolder", root)]) == 2
    error = capsys.readouterr().err
    assert "nothing tells which images are normal" in error
    assert "this is the layout of MVTec-AD: try --data MVTecAD" in error
    assert main(["check", "--data=ImageFolder", f"--data.root={root}"]) == 0
    assert "this is the layout of MVTec-AD" in capsys.readouterr().out


def test_a_category_may_be_without_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_mvtec(tmp_path)
    for folder in [*root.glob("*/test"), *root.glob("*/ground_truth"), root / "bottle"]:
        shutil.rmtree(folder)
    (root / "metal_nut").rename(root / "nut")
    words = words_of("MVTecAD", root)
    assert main(["fit", *words]) == 0
    assert main(["check", *words[-3:]]) == 0
    assert main(["test", *words, "--ckpt_path=run/checkpoints/last.ckpt"]) == 2
    assert "MVTecAD has no test images" in capsys.readouterr().err
