from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import brain_mri, clinic_db, head_ct, isic
from PIL import Image

from anomaly_clip.data import ISIC, BrainMRI, CVCClinicDB, HeadCT
from anomaly_clip.data.dataset import AnomalyData


def test_isic_lists_lesions_with_their_masks(tmp_path: Path) -> None:
    data = ISIC(str(isic(tmp_path)), image_size=16)
    assert data.categories == ["skin"]
    assert [(s.image.name, s.mask and s.mask.name) for s in data.samples("test")] == [
        ("ISIC_0000003.jpg", "ISIC_0000003_Segmentation.png"),
        ("ISIC_0000014.jpg", "ISIC_0000014_Segmentation.png"),
    ]
    assert all(s.label for s in data.samples("test"))
    assert data.dataset("test")[0]["mask"].any()


def test_clinic_db_keeps_grey_values_of_masks_until_they_are_resized(tmp_path: Path) -> None:
    data = CVCClinicDB(str(clinic_db(tmp_path)), image_size=24)
    assert [s.image.name for s in data.samples("test")] == ["1.tif", "10.tif", "2.tif"]
    image, mask = data.reader()(data.samples("test")[0])
    assert mask is not None
    assert sorted(np.unique(mask)) == [0, 100, 255]
    # Mask pixels darker than half are not defective. With MVTec-AD's rule they would be.
    ours = data.dataset("test")[0]["mask"].numpy()
    expected = np.asarray(Image.fromarray(mask).resize((24, 24), Image.Resampling.BILINEAR)) > 127.5
    assert np.array_equal(ours, expected)
    assert not ours[8, 6]
    assert ours[8, 12]
    assert image.shape == (20, 24, 3)


@pytest.mark.parametrize("nested", [False, True])
def test_head_ct_reads_its_table_by_position(tmp_path: Path, nested: bool) -> None:
    data = HeadCT(str(head_ct(tmp_path, nested=nested)), image_size=16)
    assert [(s.image.name, s.label) for s in data.samples("test")] == [
        ("000.png", True),
        ("001.png", True),
        ("100.png", False),
        ("101.png", False),
    ]
    item = data.dataset("test")[1]  # an RGBA file
    assert item["image"].shape == (3, 16, 16)
    assert "mask" not in item


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x, 1", "line 2: expected a number and 0 or 1, got x, 1"),
        ("7, 2", "line 2: expected a number"),
        ("7", "line 2: expected a number"),
        ("7, 1\n7, 0", "line 3: image 7 occurs twice"),
    ],
)
def test_a_malformed_table(tmp_path: Path, line: str, message: str) -> None:
    head_ct(tmp_path)
    (tmp_path / "labels.csv").write_text(f"id, hemorrhage\n{line}\n")
    with pytest.raises(ValueError, match=message):
        HeadCT(str(tmp_path)).samples("test")


def test_brain_mri_reads_files_by_content_and_ignores_the_second_copy(tmp_path: Path) -> None:
    data = BrainMRI(str(brain_mri(tmp_path)), image_size=16)
    assert [(s.image.name, s.label) for s in data.samples("test")] == [
        ("1 no.jpeg", False),
        ("N1.JPG", False),
        ("No15.jpg", False),
        ("Y1.jpg", True),
        ("Y2.png", True),
        ("Y3.png", True),
        ("Y4.jpg", True),
    ]
    assert {s.image.parent.parent.name for s in data.samples("test")} == {"brain_tumor_dataset"}
    dataset = data.dataset("test")
    assert all(dataset[i]["image"].shape == (3, 16, 16) for i in range(len(dataset)))


@pytest.mark.parametrize(
    ("kind", "make", "around", "expected"),
    [
        (ISIC, isic, "ISIC", "ISBI2016_ISIC_Part1_Test_Data/ and"),
        (CVCClinicDB, clinic_db, "CVC-ClinicDB", "Original/ and Ground Truth/"),
        (HeadCT, head_ct, "head_ct", r"labels\.csv and"),
        (BrainMRI, brain_mri, "archive", "brain_tumor_dataset/yes/"),
    ],
)
def test_wrapping_folders_and_wrong_roots(
    tmp_path: Path,
    kind: Callable[[str], AnomalyData],
    make: Callable[[Path], Path],
    around: str,
    expected: str,
) -> None:
    make(tmp_path / "top" / around)
    assert len(kind(str(tmp_path / "top")).samples("test")) > 1
    (tmp_path / "other" / "stuff").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"expected {expected}.*found stuff"):
        kind(str(tmp_path / "other")).samples("test")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        kind(str(tmp_path / "nowhere")).samples("test")
    with pytest.raises(ValueError, match="has no train images"):
        kind(str(tmp_path / "top")).samples("train")


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("brain_mri", BrainMRI, {False: 98, True: 155}),
        ("head_ct", HeadCT, {False: 50, True: 50}),
    ],
)
def test_real_sets_have_their_counts(
    shared_data: Callable[[str], Path],
    name: str,
    kind: Callable[..., AnomalyData],
    labels: dict[bool, int],
) -> None:
    data = kind(str(shared_data(name)), image_size=24)
    assert Counter(s.label for s in data.samples("test")) == labels
    assert data.dataset("test")[0]["image"].shape == (3, 24, 24)


def test_names_with_dots_are_names(tmp_path: Path) -> None:
    clinic_db(tmp_path)
    for name in ("1.2", "1.10"):
        for folder in ("Original", "Ground Truth"):
            shutil.copy(tmp_path / folder / "1.tif", tmp_path / folder / f"{name}.tif")
    for sample in CVCClinicDB(str(tmp_path)).samples("test"):
        assert sample.mask is not None
        assert sample.mask.name == sample.image.name
    (tmp_path / "Ground Truth" / "1.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"Original/1\.tif: its mask is missing"):
        CVCClinicDB(str(tmp_path)).samples("test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0,1\n1,1\n", r"labels\.csv, line 1: expected a header, id; got 0, 1"),
        (b"", r"labels\.csv, line 1: expected a header, id; got nothing"),
        ("id,hemorrhage\n0,1\n".encode("utf-16"), r"labels\.csv: not a CSV file in UTF-8"),
        (b'id,h\n"' + b"x" * 200_000, r"labels\.csv: not a CSV file in UTF-8"),
    ],
)
def test_files_that_are_not_tables(tmp_path: Path, content: bytes, message: str) -> None:
    head_ct(tmp_path)
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HeadCT(str(tmp_path)).samples("test")


def test_a_table_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    head_ct(tmp_path)
    text = "\ufeffid, hemorrhage\r\n0, 1\r\n\r\n100, 0\r\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
    assert [s.label for s in HeadCT(str(tmp_path)).samples("test")] == [True, False]


def test_an_image_in_the_table_must_exist(tmp_path: Path) -> None:
    head_ct(tmp_path)
    (tmp_path / "head_ct" / "100.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"head_ct/100\.png: there is no such file"):
        HeadCT(str(tmp_path)).samples("test")
