"""Copies that a file manager made: passed over, counted, and named by ``check``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import save_picture
from layouts import Maker, blob, btad, clinic_db, isic, ksdd2

from anomaly_clip.cli import main
from anomaly_clip.data import BTAD, ISIC, KSDD2, AnomalyData, CVCClinicDB, ImageFolder, MVTecAD
from anomaly_clip.data.copies import original_of, plain_name, with_copy_mark

NAMES = ["{} (copy)", "{} (1)", "{}(2)", "{} - Copy", "{} - Copy (2)", "Copy of {}", "{} copy"]
NAMES += [
    "{} copy 2",
    "{}_copy",
    "{} (another copy)",
    "{} (3rd copy)",
    "{} - Kopie",
    "Kopie von {}",
]


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_one_of_these_names_and_equal_content(name: str, tmp_path: Path) -> None:
    image = Maker().picture(tmp_path / "000.png")
    copy = Path(shutil.copy(image, tmp_path / f"{name.format('000')}.png"))
    assert plain_name(copy.stem) == "000"
    assert original_of(copy) == image
    assert original_of(image) is None
    Maker(1).picture(copy)
    assert original_of(copy) is None  # an image of its own


@pytest.mark.parametrize(
    "name", ["000", "copy", "part 1", "copyright", "screw (left)", "a-1", "(1)"]
)
def test_other_names_are_no_copies(name: str, tmp_path: Path) -> None:
    image = Maker().picture(tmp_path / f"{name}.png")
    shutil.copy(image, tmp_path / "0.png")
    assert plain_name(name) == name
    assert original_of(image) is None


def test_an_ending_may_come_before_the_mark() -> None:
    assert with_copy_mark("10301 (copy)", "_GT") == "10301_GT (copy)"
    assert with_copy_mark("10301", "_GT") is None


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return KolektorSDD2 with the stray files of its published archive."""
    root = ksdd2(tmp_path / "ksdd2")
    for name in ("10000", "10000_GT"):
        shutil.copy(root / "train" / f"{name}.png", root / "train" / f"{name} (copy).png")
    return root


def test_kolektor_sdd2_as_published_can_be_fitted(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data=KSDD2", f"--data.root={published}", "--data.num_workers=0"]
    model = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    model += ["--trainer.accelerator=cpu", "--output.folder=run"]
    assert main(["fit", *model, *words]) == 0
    line = (
        "2 images (0 anomalous) in 1 category; 1 copy is not used: train/10000 (copy).png; 1 "
        "defective training image is not used: train/10002.png"
    )
    assert line in capsys.readouterr().err
    assert main(["check", *words[:2], "--json=report.json"]) == 1
    report = json.loads(Path("report.json").read_text())
    assert report["copies"] == ["train/10000 (copy).png", "train/10000_GT (copy).png"]
    assert {problem["kind"] for problem in report["problems"]} == {"count"}  # it is a small one
    text = "2 files not used, as the content is that of the original: train/10000 (copy).png, train"
    assert text in capsys.readouterr().out
    assert report["unused"] == ["train/10002_GT.png"]  # the mask of a defective training image


def test_an_image_with_the_name_of_a_copy_is_kept(published: Path) -> None:
    Maker(5).picture(published / "train" / "10000 (copy).png", (23, 63))
    data = KSDD2(str(published))
    assert [s.image.name for s in data.samples("train")] == [
        "10000 (copy).png",
        "10000.png",
        "10001.png",
    ]
    assert data.samples("train")[0].mask == published / "train" / "10000_GT (copy).png"
    assert data.listing.copies("train") == []
    assert "copy" not in data.summary("fit")
    save_picture(published / "train" / "10000_GT (copy).png", blob((24, 61)))
    data = KSDD2(str(published))  # defective now, so that it is not trained on
    assert [s.image.name for s in data.samples("train")] == ["10000.png", "10001.png"]


def test_a_copy_whose_mask_contradicts_the_original_is_refused(published: Path) -> None:
    save_picture(published / "test" / "20000 (1).png", blob())
    shutil.copy(published / "test" / "20000.png", published / "test" / "20000 (1).png")
    save_picture(published / "test" / "20000_GT (1).png", blob((24, 61)))
    data = KSDD2(str(published))
    with pytest.raises(ValueError, match=r"20000_GT \(1\)\.png: a mask without an image"):
        data.samples("test")


Maker_ = Callable[[Path], Path]


@pytest.mark.parametrize(
    ("kind", "make", "image", "mask"),
    [
        (BTAD, btad, "01/test/ko/0000.bmp", "01/ground_truth/ko/0000.png"),
        (
            ISIC,
            isic,
            "ISBI2016_ISIC_Part1_Test_Data/ISIC_0000003.jpg",
            "ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_0000003_Segmentation.png",
        ),
        (CVCClinicDB, clinic_db, "Original/1.tif", "Ground Truth/1.tif"),
        (MVTecAD, None, "bottle/test/scratch/000.png", "bottle/ground_truth/scratch/000_mask.png"),
    ],
)
@pytest.mark.parametrize("copied", ["image", "mask", "both", "both, ending last"])
def test_copies_in_other_layouts(
    kind: type[AnomalyData],
    make: Maker_ | None,
    image: str,
    mask: str,
    copied: str,
    mvtec_root: Path,
    tmp_path: Path,
) -> None:
    root = mvtec_root if make is None else make(tmp_path / "set")
    expected = kind(str(root)).samples("test")
    for name in (image, mask) if "both" in copied else ({"image": image, "mask": mask}[copied],):
        file = root / name
        copy = file.with_stem(f"{file.stem} (copy)")
        if copied == "both, ending last" and name == mask:
            copy = file.with_stem(f"{Path(image).stem} (copy){file.stem[len(Path(image).stem) :]}")
        shutil.copy(file, copy)
    data = kind(str(root))
    assert data.samples("test") == expected
    assert len(data.listing.copies("test")) == (copied != "mask")


def test_a_users_folder_lists_copies_but_needs_no_second_mask(tmp_path: Path) -> None:
    make = Maker()
    for name in ("good/a", "cut/b", "cut/c"):
        make.picture(tmp_path / f"{name}.png")
    for name in ("good/a", "cut/b"):
        shutil.copy(tmp_path / f"{name}.png", tmp_path / f"{name} (1).png")
    assert len(ImageFolder(str(tmp_path)).samples("test")) == 5
    for name in ("b", "c"):
        save_picture(tmp_path / "ground_truth" / "cut" / f"{name}_mask.png", blob())
    data = ImageFolder(str(tmp_path))
    assert [s.image.name for s in data.samples("test") if s.label] == ["b.png", "c.png"]
    assert "not used: copies without a mask of defective images" in data.summary("test")


def test_only_files_with_such_names_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = ksdd2(tmp_path)
    read: list[Path] = []

    def compare(first: Path, second: Path, shallow: bool = True) -> bool:
        read.append(first)
        return False

    monkeypatch.setattr("filecmp.cmp", compare)
    assert len(KSDD2(str(root)).samples("test")) == 2
    assert read == []
