from __future__ import annotations

from pathlib import Path

import pytest
from layouts import litter

from anomaly_clip.data.layout import (
    by_stem,
    check_images,
    check_masks,
    images_in,
    missing_layout,
    paired_masks,
    read_table,
    shared_masks,
    subfolders,
    top_folder,
)
from anomaly_clip.data.samples import Sample


def touch(folder: Path, *names: str) -> list[Path]:
    """Create empty files; the tested functions do not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_images_are_sorted_without_stray_files(tmp_path: Path) -> None:
    litter(tmp_path)
    two, ten = touch(tmp_path, "2.png", "10.JPG")
    assert images_in(tmp_path) == [ten, two]  # names are sorted as text
    assert images_in(tmp_path / "nowhere") == []


def test_the_first_of_equal_stems_counts(tmp_path: Path) -> None:
    first, _, other = touch(tmp_path, "a.jpg", "a.png", "b.png")
    assert by_stem(tmp_path) == {"a": first, "b": other}


def test_folders_are_sorted_without_hidden_ones_and_files(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.png", "a/x.png", ".cache/x.png", "file.txt")
    assert subfolders(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert subfolders(tmp_path / "file.txt") == []


def test_an_archive_may_put_a_folder_around_a_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "BTech/01/a.png")
    assert top_folder(tmp_path, "01", "other", "BTech") == tmp_path / "BTech"
    assert top_folder(tmp_path / "BTech", "01", "BTech") == tmp_path / "BTech"
    assert top_folder(tmp_path, "02", "BTech") == tmp_path  # errors name the folder given


def test_a_mask_has_the_name_of_its_image_and_an_ending(tmp_path: Path) -> None:
    images = [Path("1.png"), Path("2.png"), Path("3.png")]
    both, _, plain = touch(tmp_path, "1_mask.png", "1.png", "2.bmp")
    masks = paired_masks(images, tmp_path)
    assert list(masks.values()) == [both, plain, tmp_path / "3_mask.png"]
    assert paired_masks(images[:1], tmp_path, ["", "_mask"]) == {images[0]: tmp_path / "1.png"}


def test_a_table_is_read_with_the_numbers_of_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("\ufeffId, Label, more\n1, 0, x\n\n , ,\n2, 1, y\n", encoding="utf-8")
    assert list(read_table(file, ["id", "label"])) == [(2, ["1", "0", "x"]), (5, ["2", "1", "y"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: expected a header, id, label; got nothing"),
        (b"label,id\n1,0\n", "line 1: expected a header, id, label; got label, id"),
        (b"id,label\n\xff,1\n", "not a CSV file in UTF-8"),
    ],
)
def test_invalid_tables_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels\.csv.*{message}"):
        list(read_table(file, ["id", "label"]))
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such file"):
        list(read_table(tmp_path / "none.csv", ["id"]))


def test_missing_files_and_shared_masks_are_refused(tmp_path: Path) -> None:
    first, second, third, mask = touch(tmp_path, "1.png", "2.png", "3.png", "m.png")
    valid = [Sample(first, "a", True, mask), Sample(second, "a", False), Sample(third, "a", False)]
    check_images(valid)
    check_masks(valid)
    assert shared_masks(valid) == {}
    shared = [*valid, Sample(third, "a", True, mask)]
    assert shared_masks(iter(shared)) == {mask: [first, third]}
    with pytest.raises(ValueError, match=r"m\.png: the mask of two images, 1\.png and 3\.png"):
        check_masks(iter(shared))
    with pytest.raises(FileNotFoundError, match=r"4\.png: there is no such file"):
        check_images([Sample(tmp_path / "4.png", "a", False)])
    with pytest.raises(FileNotFoundError, match=r"1\.png: its mask is missing, expected .*n\.png"):
        check_masks([Sample(first, "a", True, tmp_path / "n.png")])


@pytest.mark.parametrize("count", [0, 8, 9])
def test_an_unexpected_layout_is_reported_with_its_content(tmp_path: Path, count: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    touch(root, *(f"{number}.txt" for number in range(count)))
    message = str(missing_layout(root, "train/good"))
    assert message.startswith(f"data.root {root}: expected train/good; found ")
    listed = message.partition("; found ")[2]
    names = ", ".join(f"{number}.txt" for number in range(min(count, 8)))
    assert listed == {0: "nothing", 8: names, 9: f"{names}, ..."}[count]
    assert "there is no such folder" in str(missing_layout(tmp_path / "none", "x"))
    (file,) = touch(tmp_path, "file")
    assert "is a file; expected a folder with x" in str(missing_layout(file, "x"))
