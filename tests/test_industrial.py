from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture
from layouts import Maker, blob, btad, industrial_folders, ksdd2, visa

from anomaly_clip.cli import main
from anomaly_clip.data import BTAD, KSDD2, IndustrialFolders, MagneticTile, MVTecAD, VisA
from anomaly_clip.data.dataset import AnomalyData, read_mask


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
    ("categories", "message"),
    [
        (["botle"], r"'botle' is not in .* \(available: bottle, metal_nut\)"),
        (["bottle", "bottle"], "'bottle' occurs twice"),
        ([], "the list is empty"),
    ],
)
def test_invalid_categories(mvtec_root: Path, categories: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = MVTecAD(str(mvtec_root), categories=categories).categories


def test_a_missing_mask_names_image_and_mask(mvtec_root: Path) -> None:
    (mvtec_root / "bottle" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"scratch/001\.png: its mask is missing, .*001_mask"
    ):
        MVTecAD(str(mvtec_root)).samples("test")


def test_wrong_roots_report_expected_and_actual_content(mvtec_root: Path) -> None:
    cases = {
        mvtec_root / "nowhere": "there is no such folder; expected MVTec-AD's layout",
        mvtec_root / "bottle" / "train": "found good",
        mvtec_root / "bottle": f"this looks like one category: try {mvtec_root}",
        mvtec_root / "bottle" / "train" / "good" / "000.png": "is a file",
    }
    for root, message in cases.items():
        with pytest.raises(FileNotFoundError) as error:
            _ = MVTecAD(str(root)).categories
        assert message in str(error.value)
        assert str(root) in str(error.value)


def test_an_empty_category_is_named(mvtec_root: Path) -> None:
    shutil.rmtree(mvtec_root / "bottle" / "test")
    (mvtec_root / "bottle" / "test" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="category 'bottle' has no test images"):
        MVTecAD(str(mvtec_root)).samples("test")


def rows(data: AnomalyData, split: str) -> list[tuple[str, str, str | None]]:
    """Return the category and the file names of image and mask of each sample."""
    return [
        (s.category, s.image.name, s.mask.name if s.mask else None)
        for s in data.samples(split)  # type: ignore[arg-type]
    ]


def test_visa_follows_the_official_split_file(tmp_path: Path) -> None:
    data = VisA(str(visa(tmp_path)), image_size=20)
    assert data.categories == ["candle", "pipe_fryum"]
    assert rows(data, "train") == [
        (category, name, None)
        for category in ("candle", "pipe_fryum")
        for name in ("0000.JPG", "0001.JPG")
    ]
    test = [r[1:] for r in rows(data, "test") if r[0] == "candle"]
    # The order is that of the file, in which the normal images come first.
    assert test == [("0002.JPG", None), ("000.JPG", "000.png"), ("001.JPG", "001.png")]
    assert [s.label for s in data.samples("test")] == [False, True, True] * 2
    # Masks contain class numbers: pixels of value 1 and 2 are defective, just as white ones are.
    masks = [data.dataset("test")[i]["mask"].sum() for i in (1, 2)]
    assert masks[0] == masks[1] > 0
    assert data.protocol()["official_split"] is True


def test_visa_without_its_split_file_has_test_images_only(tmp_path: Path) -> None:
    data = VisA(str(visa(tmp_path, split_file=False)))
    assert data.splits == ("test",)
    assert [r[1:] for r in rows(data, "test") if r[0] == "candle"] == [
        ("0000.JPG", None),
        ("0001.JPG", None),
        ("0002.JPG", None),
        ("000.JPG", "000.png"),
        ("001.JPG", "001.png"),
    ]
    assert data.protocol()["official_split"] is False
    with pytest.raises(ValueError, match="VisA has no train images"):
        data.samples("train")


def test_visa_converted_to_the_layout_of_mvtec(mvtec_root: Path) -> None:
    data = VisA(str(mvtec_root))
    assert rows(data, "test") == rows(MVTecAD(str(mvtec_root)), "test")
    assert data.splits == ("train", "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("candle,train", "line 2: expected object, split, label, image, mask, got candle, train"),
        ("candle,val,normal,a.JPG,", "line 2: expected object"),
        ("candle,test,bad,a.JPG,", "line 2: expected object"),
        ("candle,test,normal,../a.JPG,", "is not below"),
        ("candle,test,normal,/etc/a.JPG,", "is not below"),
    ],
)
def test_a_malformed_split_file(tmp_path: Path, line: str, message: str) -> None:
    visa(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text(f"object,split,label,image,mask\n{line}\n")
    with pytest.raises(ValueError, match=message):
        VisA(str(tmp_path), categories=["candle"]).samples("test")


@pytest.mark.parametrize("around", ["", "BTech_Dataset_transformed"])
def test_btad_pairs_images_and_masks_of_different_formats(tmp_path: Path, around: str) -> None:
    btad(tmp_path / around)
    data = BTAD(str(tmp_path))
    assert data.categories == ["01", "02", "03"]
    assert [r[1:] for r in rows(data, "test") if r[0] == "01"] == [
        ("0000.bmp", "0000.png"),
        ("0001.bmp", "0001.png"),
        ("0000.bmp", None),
    ]
    assert rows(data, "train")[0] == ("01", "0000.bmp", None)
    assert len(data.samples("train")) == 6
    assert data.words("01") == "product"


def test_ksdd2_labels_follow_the_masks(tmp_path: Path) -> None:
    data = KSDD2(str(ksdd2(tmp_path)), image_size=32)
    assert [s.image.name for s in data.samples("train")] == ["10000.png", "10001.png"]
    assert [(s.image.name, s.label) for s in data.samples("test")] == [
        ("20000.png", False),
        ("20001.png", True),
    ]
    item = data.dataset("test")[1]
    assert item["mask"].any()  # although mask and image differ in size by a few pixels
    assert not data.dataset("test")[0]["mask"].any()


def test_ksdd2_refuses_missing_and_mismatched_masks(tmp_path: Path) -> None:
    ksdd2(tmp_path)
    (tmp_path / "train" / "10000_GT.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"10000\.png: its mask is missing"):
        KSDD2(str(tmp_path)).samples("train")
    save_picture(tmp_path / "test" / "20001_GT.png", blob((24, 20)))
    with pytest.raises(ValueError, match=r"20001_GT\.png: the mask is 24 x 20 pixels"):
        KSDD2(str(tmp_path), image_size=32).dataset("test")[1]
    with pytest.raises(FileNotFoundError, match=r"expected train/10000\.png"):
        _ = KSDD2(str(tmp_path / "train")).categories


def test_industrial_folders_are_normal_and_train(tmp_path: Path) -> None:
    data = IndustrialFolders(str(industrial_folders(tmp_path)), image_size=16)
    assert data.categories == ["bent metal stripe", "toy wheel"]
    assert Counter(s.category for s in data.samples("train")) == {
        "bent metal stripe": 3,
        "toy wheel": 1,
    }
    assert not any(s.label for s in data.samples("train"))
    assert "mask" not in data.dataset("train")[0]
    with pytest.raises(ValueError, match="IndustrialFolders has no test images"):
        data.samples("test")
    (tmp_path / "Washer").mkdir()
    data = IndustrialFolders(str(tmp_path), image_size=16)
    assert data.categories == ["bent metal stripe", "toy wheel", "washer"]
    with pytest.raises(ValueError, match="category 'washer' has no train images: add some"):
        data.samples("train")
    data = IndustrialFolders(str(tmp_path), image_size=16, categories=["toy wheel"])
    assert len(data.samples("train")) == 1
    (tmp_path / "toy wheel").mkdir()
    save_picture(tmp_path / "toy wheel" / "0.png")
    with pytest.raises(ValueError, match="two folders are called 'toy wheel'"):
        _ = data.categories


def test_the_order_of_the_file_system_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [
        (VisA, visa(tmp_path / "visa")),
        (BTAD, btad(tmp_path / "btad")),
        (KSDD2, ksdd2(tmp_path / "ksdd2")),
    ]
    before = [kind(str(root)).samples("test") for kind, root in roots]
    ordinary, ordinary_glob = Path.iterdir, Path.glob
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(ordinary(self))))
    monkeypatch.setattr(Path, "glob", lambda self, p: reversed(list(ordinary_glob(self, p))))
    assert [kind(str(root)).samples("test") for kind, root in roots] == before


def test_a_mask_is_never_paired_with_another_image(tmp_path: Path) -> None:
    btad(tmp_path)
    (tmp_path / "01" / "ground_truth" / "ko" / "0000.png").rename(
        tmp_path / "01" / "ground_truth" / "ko" / "0002.png"
    )
    with pytest.raises(FileNotFoundError, match=r"ko/0000\.bmp: its mask is missing"):
        BTAD(str(tmp_path)).samples("test")


@pytest.mark.parametrize("name", ["nail [3]", "*", "näg el", "x" * 200])
def test_unusual_file_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "01"
    for path in ("train/ok/a", "test/ok/b", f"test/ko/{name}"):
        save_picture(folder / f"{path}.png")
    save_picture(folder / "ground_truth" / "ko" / f"{name}.png", np.full((40, 40), 255, np.uint8))
    sample = BTAD(str(tmp_path)).samples("test")[0]
    assert sample.mask == folder / "ground_truth" / "ko" / f"{name}.png"


def test_circular_links_are_not_followed_forever(mvtec_root: Path) -> None:
    (mvtec_root / "loop").symlink_to(mvtec_root / "loop")
    (mvtec_root / "bottle" / "test" / "round").symlink_to(mvtec_root / "bottle" / "test")
    assert MVTecAD(str(mvtec_root)).categories == ["bottle", "metal_nut"]
    assert len(MVTecAD(str(mvtec_root)).samples("test")) == 8


def test_a_mask_of_three_channels_is_defective_where_any_is_set(mvtec_root: Path) -> None:
    path = mvtec_root / "bottle" / "ground_truth" / "scratch" / "000_mask.png"
    mask = np.zeros((40, 48, 3), np.uint8)
    mask[:10, :, 2] = 255
    save_picture(path, mask)
    item = MVTecAD(str(mvtec_root), image_size=48, mask_size=40).dataset("test")[2]
    assert item["mask"][:9].all()
    assert not item["mask"][11:].any()


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


@pytest.mark.parametrize(
    ("name", "kind", "sums"),
    [
        (
            "mvtec_leather",
            MVTecAD,
            {"color": 5092, "cut": 1329, "fold": 9203, "glue": 17707, "poke": 1608},
        ),
        (
            "magnetic_tile",
            MagneticTile,
            {"blowhole": 14311, "break": 291489, "crack": 24742, "fray": 701215, "uneven": 2508124},
        ),
    ],
)
def test_masks_of_the_real_sets_have_their_numbers_of_pixels(
    shared_data: Callable[[str], Path], name: str, kind: type[AnomalyData], sums: dict[str, int]
) -> None:
    data = kind(str(shared_data(name)))
    totals: Counter[str] = Counter()
    for sample in data.samples("test"):
        if sample.mask is not None:
            totals[sample.defect] += int(read_mask(sample.mask).sum())
    assert totals == sums  # numbers of pixels, counted with numpy


# -- masks are optional in MVTec-AD's layout -----------------------------------------------------


def without_masks(root: Path) -> Path:
    for folder in root.glob("*/ground_truth"):
        shutil.rmtree(folder)
    return root


def test_without_any_mask_there_are_image_metrics_only(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = MVTecAD(str(without_masks(mvtec_root)))
    assert not data.has_masks
    assert {sample.mask for sample in data.samples("test")} == {None}
    words = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    words += [f"--data.root={mvtec_root}", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    assert main(["each", "--data=MVTecAD", *words, "--output.folder=run"]) == 0
    mean = json.loads(Path("run/metrics.json").read_text())["mean"]
    assert mean["image_auroc"] is not None
    assert mean["pixel_auroc"] is None
    assert main(["check", "--data=MVTecAD", f"--data.root={mvtec_root}", "--json=report.json"]) == 1
    problems = json.loads(Path("report.json").read_text())["problems"]
    assert {problem["kind"] for problem in problems} == {"count"}  # two published categories


def test_one_missing_mask_is_an_error(mvtec_root: Path) -> None:
    (mvtec_root / "bottle/ground_truth/scratch/000_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match="its mask is missing"):
        MVTecAD(str(mvtec_root)).samples("test")
    shutil.rmtree(mvtec_root / "bottle" / "ground_truth")  # another category has masks
    with pytest.raises(FileNotFoundError, match="its mask is missing"):
        MVTecAD(str(mvtec_root)).samples("test")
    assert MVTecAD(str(mvtec_root), categories=["bottle"]).has_masks is False


def test_masks_of_normal_images_must_be_empty(mvtec_root: Path) -> None:
    place = mvtec_root / "bottle" / "ground_truth" / "good"
    for name in ("000_mask", "001"):
        save_picture(place / f"{name}.png", np.zeros((40, 48), dtype=np.uint8))
    assert len(MVTecAD(str(mvtec_root)).samples("test")) == 8
    save_picture(place / "000_mask.png", blob((48, 40)))
    with pytest.raises(ValueError, match="the mask of a normal image is not empty: move the image"):
        MVTecAD(str(mvtec_root)).samples("test")
    (place / "000_mask.png").rename(place / "z_mask.png")
    with pytest.raises(ValueError, match=r"z_mask\.png: a mask without an image"):
        MVTecAD(str(mvtec_root)).samples("test")


def test_other_names_of_the_normal_folder_and_defects_in_training(mvtec_root: Path) -> None:
    for split in ("train", "test"):
        folder = mvtec_root / "bottle" / split
        (folder / "good").rename(folder / "OK")
    save_picture(mvtec_root / "bottle" / "train" / "scratch" / "000.png")
    data = MVTecAD(str(mvtec_root), categories=["bottle"])
    assert [(s.label, s.defect) for s in data.samples("train")] == [(False, "good")] * 2
    assert Counter(s.label for s in data.samples("test")) == {False: 2, True: 2}


def converted_visa(root: Path) -> Path:
    for category in ("candle", "cashew"):
        for name in ("train/good/0", "train/good/1", "test/good/0", "test/bad/0", "test/bad/1"):
            Maker(len(name)).picture(root / category / f"{name}.png")
    return root


def visa_without(root: Path, *, split_file: bool, masks: bool = False) -> Path:
    """Write VisA without masks, and without their names in the split file unless ``masks``."""
    for folder in visa(root, split_file=split_file).glob("*/Data/Masks"):
        shutil.rmtree(folder)
    if split_file and not masks:
        table = root / "split_csv" / "1cls.csv"
        lines = [line.rpartition(",")[0] + "," for line in table.read_text().splitlines()[1:]]
        table.write_text("\n".join(["object,split,label,image,mask", *lines]) + "\n")
    return root


SETS_WITHOUT_MASKS: dict[str, tuple[type[AnomalyData], Callable[[Path], Path]]] = {
    "btad": (BTAD, lambda root: without_masks(btad(root))),
    "converted": (VisA, converted_visa),
    "visa": (VisA, lambda root: visa_without(root, split_file=True)),
    "named": (VisA, lambda root: visa_without(root, split_file=True, masks=True)),
    "unsplit": (VisA, lambda root: visa_without(root, split_file=False)),
}


@pytest.mark.parametrize("name", SETS_WITHOUT_MASKS)
def test_masks_are_optional_in_every_layout(name: str, tmp_path: Path) -> None:
    kind, write = SETS_WITHOUT_MASKS[name]
    data = kind(str(write(tmp_path)), image_size=16)
    assert not data.has_masks
    anomalous = [sample for sample in data.samples("test") if sample.label]
    assert anomalous
    assert {sample.mask for sample in anomalous} == {None}


def test_masks_named_by_the_split_file_may_be_anywhere(tmp_path: Path) -> None:
    root = visa(tmp_path)
    for category in ("candle", "pipe_fryum"):
        (root / category / "Data" / "Masks").rename(root / category / "labels")
    table = root / "split_csv" / "1cls.csv"
    table.write_text(table.read_text().replace("Data/Masks", "labels"))
    assert VisA(str(root)).has_masks
    assert len(VisA(str(root)).samples("test")) == 6
    (root / "candle" / "labels" / "Anomaly" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match="its mask is missing"):
        VisA(str(root)).samples("test")


@pytest.mark.parametrize(("kind", "write"), [(BTAD, btad), (VisA, visa)])
def test_one_missing_mask_is_an_error_in_every_layout(
    kind: type[AnomalyData], write: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = write(tmp_path)
    min([*root.glob("*/ground_truth/ko/*"), *root.glob("*/Data/Masks/Anomaly/*")]).unlink()
    with pytest.raises(FileNotFoundError, match="its mask is missing"):
        kind(str(root)).samples("test")


@pytest.mark.slow
def test_fit_and_test_without_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    without_masks(btad(tmp_path / "data"))
    words = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    words += ["--data=BTAD", "--data.root=data", "--data.categories=[02]"]
    words += ["--trainer.accelerator=cpu", "--data.num_workers=0", "--output.page=false"]
    assert main(["each", *words, "--output.folder=run"]) == 0
    mean = json.loads(Path("run/metrics.json").read_text())["mean"]
    assert mean["image_auroc"] is not None
    assert mean["pixel_auroc"] is None


# -- images in subfolders ------------------------------------------------------------------------


def test_images_in_subfolders_are_counted(mvtec_root: Path, tmp_path: Path) -> None:
    make = Maker(6)
    bottle = mvtec_root / "bottle"
    for name in ("train/good/cam2/0", "train/good/cam2/deep/1", "test/scratch/cam2/0"):
        make.picture(bottle / f"{name}.png")
    make.picture(tmp_path / "elsewhere" / "a.png")
    (bottle / "train" / "good" / "more").symlink_to(tmp_path / "elsewhere")
    (bottle / "train" / "good" / "loop").symlink_to(bottle, target_is_directory=True)
    data = MVTecAD(str(mvtec_root), categories=["bottle"])
    line = (
        "3 images in subfolders of train/good/ are not used, such as bottle/train/good/cam2/0.png"
    )
    assert line in data.summary("fit")
    line = "1 image in subfolders of test/scratch/ is not used: bottle/test/scratch/cam2/0.png"
    assert line in data.summary("test")
    assert line not in data.summary("fit")
    other = next(name for name in MVTecAD(str(mvtec_root)).categories if name != "bottle")
    assert "subfolders" not in MVTecAD(str(mvtec_root), categories=[other]).summary("fit")


def test_subfolders_of_other_layouts_are_counted(tmp_path: Path) -> None:
    make = Maker(7)
    make.picture(btad(tmp_path / "btad") / "01" / "train" / "ok" / "more" / "0.png")
    data: AnomalyData = BTAD(str(tmp_path / "btad"))
    assert "1 image in subfolders of train/ok/ is not used" in data.summary("fit")
    root = visa(tmp_path / "visa", split_file=False)
    for category in ("candle", "pipe_fryum"):
        for kind in ("Normal", "Anomaly"):
            make.picture(root / category / "Data" / "Images" / kind / "more" / "0.png")
    line = "4 images in subfolders of Data/Images/Anomaly/ and Data/Images/Normal/ are not used"
    assert line in VisA(str(root)).summary("test")
