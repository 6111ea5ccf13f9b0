"""Forms of a user's folder: neighbours of each, and folders that must be refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.data.folder_forms import FolderForm, understand
from anomaly_clip.data.mask_content import looks_like_a_mask

MASK = np.zeros((40, 40), dtype=np.uint8)
MASK[10:20] = 255


def write(root: Path, *names: str, mask: bool = False) -> None:
    for name in names:
        save_picture(root / name, MASK if mask else None)


def read(root: Path, **options: object) -> FolderForm:
    return understand(root, "plank", **options)  # type: ignore[arg-type]


def names(form: FolderForm) -> dict[str, list[str]]:
    """Return the images of a form, by the defect that they are listed under."""
    listed: dict[str, list[str]] = {}
    for sample in form.labelled:
        listed.setdefault(sample.defect, []).append(sample.image.name)
    return listed


@pytest.mark.parametrize("normal", ["good", "Good", "OK", "ok", "normal", "NORMAL"])
@pytest.mark.parametrize("defect", ["NG", "bad", "scratch"])
def test_names_of_normal_folders(tmp_path: Path, normal: str, defect: str) -> None:
    write(tmp_path, f"{normal}/a.png", f"{normal}/b.png", f"{defect}/c.png")
    form = read(tmp_path)
    assert names(form) == {"good": ["a.png", "b.png"], defect: ["c.png"]}
    assert [sample.label for sample in form.labelled if sample.defect == "good"] == [False, False]
    assert form.has_labels
    assert not form.has_masks
    assert "there are no masks" in form.remarks[0]


def test_other_names_of_normal_folders_are_given(tmp_path: Path) -> None:
    write(tmp_path, "in ordnung/a.png", "kratzer/b.png")
    assert not read(tmp_path).has_labels
    form = read(tmp_path, normal_folders=["In Ordnung"])
    assert names(form) == {"good": ["a.png"], "kratzer": ["b.png"]}


@pytest.mark.parametrize("train", ["train/good", "Train/OK", "train"])
@pytest.mark.parametrize("test", ["test/good", "test/ok"])
def test_training_images_in_a_folder_of_their_own(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path, f"{train}/a.png", f"{train}/b.png", f"{test}/c.png", "test/cut/d.png")
    form = read(tmp_path)
    assert [sample.image.name for sample in form.train] == ["a.png", "b.png"]
    assert names(form) == {"cut": ["d.png"], "good": ["c.png"]}
    assert "contains the 2 training images" in form.remarks[0]


def test_training_images_alone(tmp_path: Path) -> None:
    write(tmp_path, "train/good/a.png")
    form = read(tmp_path)
    assert (len(form.train), form.labelled, form.unlabelled) == (1, [], [])


def test_a_tree_without_labels(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "x/a.jpg", "x/y/c.png")
    form = read(tmp_path)
    assert [(s.image.name, s.defect) for s in form.unlabelled] == [
        ("b.png", ""),
        ("a.jpg", "x"),
        ("c.png", "x/y"),
    ]
    assert not form.has_labels
    assert form.remarks == [
        "3 images without labels, because no folder is called good or " + "normal or ok"
    ]


def test_a_root_that_is_itself_called_good(tmp_path: Path) -> None:
    write(tmp_path, "Good/a.png")
    form = read(tmp_path / "Good")
    assert form.remarks == [
        "1 image without labels, because Good is the folder itself, not one in it"
    ]


MASK_PLACES = [
    ("ground_truth/cut/a_mask.png", "ground_truth/cut/b_mask.png"),
    ("ground_truth/cut/a.png", "ground_truth/cut/b.png"),
    ("ground_truth/a_mask.png", "ground_truth/b_mask.png"),
    ("mask/a.png", "mask/b.png"),
    ("Masks/cut/a_gt.png", "Masks/cut/b_gt.png"),
    ("gt/a_label.png", "gt/b.png"),
    ("cut/a_mask.png", "cut/b_mask.png"),
    ("cut/a_gt.png", "cut/b_label.png"),
    ("annotations/a.png", "annotations/b.png"),
    ("Labels/cut/A_Mask.png", "Labels/cut/b_GT.png"),
    ("cut/masks/a.png", "cut/masks/b.png"),
    ("cut_mask/a.png", "cut_mask/b.png"),
    ("white_on_black/a.png", "white_on_black/b.png"),
]


@pytest.mark.parametrize("masks", MASK_PLACES)
def test_places_of_masks(tmp_path: Path, masks: tuple[str, str]) -> None:
    write(tmp_path, "good/a.png", "cut/a.png", "cut/b.png")
    write(tmp_path, *masks, mask=True)
    form = read(tmp_path)
    assert names(form) == {"cut": ["a.png", "b.png"], "good": ["a.png"]}
    assert [s.mask for s in form.labelled if s.label] == [tmp_path / mask for mask in masks]
    assert form.has_masks


@pytest.mark.parametrize("place", ["ground_truth/cut", "test/ground_truth/cut"])
def test_masks_of_a_test_folder(tmp_path: Path, place: str) -> None:
    write(tmp_path, "train/good/a.png", "test/good/a.png", "test/cut/a.png")
    write(tmp_path, f"{place}/a_mask.png", mask=True)
    (defective,) = [sample for sample in read(tmp_path).labelled if sample.label]
    assert defective.mask == tmp_path / place / "a_mask.png"


def test_the_ending_of_masks_is_given(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "cut/b.png")
    write(tmp_path, "ground_truth/cut/b-seg.png", mask=True)
    (defective,) = [s for s in read(tmp_path, mask_ending="-seg").labelled if s.label]
    assert defective.mask == tmp_path / "ground_truth/cut/b-seg.png"


def test_a_missing_mask_gets_its_expected_path(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "cut/a.png", "cut/b.png")
    write(tmp_path, "ground_truth/cut/a_mask.png", mask=True)
    masks = [sample.mask for sample in read(tmp_path).labelled if sample.label]
    assert masks[1] == tmp_path / "ground_truth/cut/b_mask.png"
    assert not masks[1].exists()


def test_photographs_are_not_taken_for_masks(tmp_path: Path) -> None:
    """Photographs with the names of others, as in MVTec-AD's numbering, are a kind of defect."""
    write(tmp_path, "good/000.png", "good/001.png", "cut/000.png", "cut/000_label.png")
    assert names(read(tmp_path)) == {
        "cut": ["000.png", "000_label.png"],
        "good": ["000.png", "001.png"],
    }
    write(tmp_path, "mask/worker.png")
    with pytest.raises(ValueError, match=r"mask: a folder of this name should contain masks, but"):
        read(tmp_path)


def test_masks_without_an_image_are_kept_for_the_check(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "cut/b.png")
    write(tmp_path, "ground_truth/cut/b_mask.png", "ground_truth/cut/z_mask.png", mask=True)
    form = read(tmp_path)
    assert tmp_path / "ground_truth" / "cut" in form.mask_folders


def test_own_results_are_not_images(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "runs/predict/1/maps/x/a.png", "runs/other/b.png")
    (tmp_path / "runs/predict/1/config-predict.yaml").touch()
    form = read(tmp_path)
    assert [sample.image.name for sample in form.unlabelled] == ["a.png", "b.png"]
    assert form.remarks[-1].startswith("not used: folders of results, such as runs/predict/1")


def test_what_is_not_used_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "good/batch 2/b.png", "cut/c.png", "d.png")
    remarks = read(tmp_path).remarks
    assert "not used: images next to the folders (1)" in remarks


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "b.png")
    write(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "shift 2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    form = read(tmp_path / "photos")
    assert [sample.image.name for sample in form.unlabelled] == ["a.png", "b.png"]


def test_black_and_white_images_look_like_masks(tmp_path: Path) -> None:
    write(tmp_path, "photo.png")
    write(tmp_path, "mask.png", mask=True)
    save_picture(tmp_path / "mask.jpg", np.repeat(MASK[..., None], 3, axis=2))
    (tmp_path / "damaged.png").write_bytes(b"no image")
    looks = {path.name: looks_like_a_mask(path) for path in tmp_path.iterdir()}
    assert looks == {"photo.png": False, "mask.png": True, "mask.jpg": True, "damaged.png": False}


def test_deeper_trees_of_a_folder_called_train_are_unlabelled(tmp_path: Path) -> None:
    write(tmp_path, "train/wagon/1/a.png", "train/wagon/2/b.png", "car/c.png")
    form = read(tmp_path)
    assert [sample.image.name for sample in form.unlabelled] == ["c.png", "a.png", "b.png"]
    assert len(form.remarks) == 1


def test_a_kind_of_defect_is_no_mask_folder_if_one_image_is_a_photograph(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", *(f"cut/{n}.png" for n in range(5)), "dark/4.png")
    write(tmp_path, *(f"dark/{n}.png" for n in range(4)), mask=True)
    assert len(names(read(tmp_path))["dark"]) == 5


def test_images_next_to_the_folders_of_a_test_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "train/a.png", "test/b.png", "test/good/c.png")
    assert "not used: images next to the folders (1)" in read(tmp_path).remarks


def test_an_empty_mask_folder_makes_no_mask_compulsory(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "cut/b.png")
    (tmp_path / "ground_truth" / "cut").mkdir(parents=True)
    assert not read(tmp_path).has_masks


def test_masks_of_normal_images_alone_make_no_mask_compulsory(tmp_path: Path) -> None:
    write(tmp_path, "good/a.png", "cut/b.png")
    save_picture(tmp_path / "ground_truth/good/a_mask.png", np.zeros((40, 40), dtype=np.uint8))
    assert not read(tmp_path).has_masks


# -- images below labelled folders ---------------------------------------------------------------


def test_images_at_any_depth_have_the_label_of_the_top_folder(tmp_path: Path) -> None:
    write(tmp_path, "good/cam1/1.png", "good/cam2/x/1.png", "bad/cam1/2.png", "bad/3.png")
    form = read(tmp_path)
    assert names(form) == {"bad": ["3.png", "2.png"], "good": ["1.png", "1.png"]}
    assert form.remarks == [
        "good/ (2 in 2 folders) is normal, bad/ (2 in 2 folders) defective, there are no masks"
    ]


@pytest.mark.parametrize("place", ["train/good/a/b/1.png", "train/ok/a/1.png"])
def test_training_images_at_any_depth(tmp_path: Path, place: str) -> None:
    write(
        tmp_path, place, "train/2.png", "train/bad/3.png", "test/good/a/1.png", "test/bad/a/2.png"
    )
    form = read(tmp_path)
    assert [sample.image for sample in form.train] == [tmp_path / place]
    assert names(form) == {"bad": ["2.png"], "good": ["1.png"]}
    assert "not used: images of train/ that are not in its normal folder (2)" in form.remarks


DEEP_MASKS = [
    ("ground_truth/bad/cam1/1_mask.png", "ground_truth/bad/cam2/1_mask.png"),
    ("masks/cam1/1.png", "masks/cam2/1.png"),
    ("bad/cam1/mask/1.png", "bad/cam2/mask/1.png"),
    ("bad/masks/cam1/1.png", "bad/masks/cam2/1.png"),
    ("bad/cam1/1_gt.png", "bad/cam2/1_gt.png"),
]


@pytest.mark.parametrize("masks", DEEP_MASKS)
def test_masks_of_images_at_any_depth(tmp_path: Path, masks: tuple[str, str]) -> None:
    write(tmp_path, "good/1.png", "bad/cam1/1.png", "bad/cam2/1.png")
    write(tmp_path, *masks, mask=True)
    form = read(tmp_path)
    assert [s.mask for s in form.labelled if s.label] == [tmp_path / mask for mask in masks]
    assert names(form) == {"bad": ["1.png", "1.png"], "good": ["1.png"]}


def test_folders_whose_names_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "line 2/good/2.png", "line 2/bad/3.png")
    form = read(tmp_path)
    assert names(form) == {"good": ["1.png"], "line 2": ["3.png"]}
    text = "not used: images in line 2/good/, whose names contradict each other (1)"
    assert text in form.remarks


def test_labels_deeper_in_a_tree_are_pointed_at(tmp_path: Path) -> None:
    write(tmp_path, "cam1/good/1.png", "cam1/bad/2.png")
    form = read(tmp_path)
    assert not form.has_labels
    assert form.remarks[1].endswith(f"as with --data.root {tmp_path / 'cam1'}")


# -- several folders of a kind, and names --------------------------------------------------------


def test_no_image_is_lost_among_folders_of_similar_names(tmp_path: Path) -> None:
    write(tmp_path, "Train/good/1.png", "train/OK/2.png", "train/good/3.png")
    write(tmp_path, "Test/good/4.png", "test/ok/5.png", "test/NG/6.png")
    form = read(tmp_path)
    assert sorted(s.image.name for s in form.train) == ["1.png", "2.png", "3.png"]
    assert names(form) == {"NG": ["6.png"], "good": ["4.png", "5.png"]}
    write(tmp_path / "two", "good/1.png", "OK/2.png", "ng/3.png")
    form = read(tmp_path / "two")
    assert names(form) == {"good": ["2.png", "1.png"], "ng": ["3.png"]}
    assert form.remarks[0].startswith("OK/ (1) and good/ (1) are normal")


def test_a_test_folder_without_train(tmp_path: Path) -> None:
    write(tmp_path, "test/good/1.png", "test/bad/2.png", "3.png")
    form = read(tmp_path)
    assert names(form) == {"bad": ["2.png"], "good": ["1.png"]}
    assert "not used: images next to test/ (1)" in form.remarks


def test_normal_folders_that_are_not_there_are_told(tmp_path: Path) -> None:
    write(tmp_path, "in_spec/1.png", "okay/2.png", "bad/3.png")
    remarks = read(tmp_path, normal_folders=["in_spce", "okay/"]).remarks
    assert "data.normal_folders: there is no folder in_spce (did you mean in_spec?)" in remarks
    assert not any("okay/ (" in remark and "no folder" in remark[:10] for remark in remarks)
    assert len(read(tmp_path, normal_folders=["in_spec", "okay"]).remarks) == 1


COMPOSED, APART = "Kratzer \u00e9", "Kratzer e\u0301"  # as macOS writes it


@pytest.mark.parametrize(("image", "mask"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_names_in_two_normal_forms_are_paired(tmp_path: Path, image: str, mask: str) -> None:
    write(tmp_path, "good/1.png", f"{image}/{image}.png", f"{image}/2.png")
    write(tmp_path, f"ground_truth/{mask}/{mask}_mask.png", mask=True)
    write(tmp_path, f"ground_truth/{mask}/2.png", mask=True)
    assert all(s.mask and s.mask.is_file() for s in read(tmp_path).labelled if s.label)
    form = read(tmp_path, normal_folders=[mask])
    assert [s.image.name for s in form.labelled if not s.label] == ["2.png", f"{image}.png"]


# -- what is no image ----------------------------------------------------------------------------


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "good/@eaDir/1.png/thumb.png", "bad/2.png", "__old/3.png")
    write(tmp_path, "bad/0.png/4.png", "good/1_mask.png", mask=True)
    os.mkfifo(tmp_path / "bad" / "x.png")
    for name in ("good/notes.txt", "labels.csv", "bad/Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "good" / "loop").symlink_to("..")
    form = read(tmp_path)
    assert names(form) == {"bad": ["4.png", "2.png"], "good": ["1.png"]}
    assert set(form.remarks[1:]) == {
        "not used: masks of images that are not defective, such as good/1_mask.png (1)",
        "not used: pipes or the like with names of images, such as bad/x.png (1)",
        "not used: names that begin with @, $ or __, such as __old (2)",
        "not used: files that are not images, such as good/notes.txt (2)",
        "not used: links to folders that are read elsewhere or contain the link, such as "
        "good/loop (1)",
    }


def test_a_link_to_a_missing_image_is_listed_as_an_image(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png")
    (tmp_path / "good" / "2.png").symlink_to("nowhere.png")
    assert names(read(tmp_path)) == {"good": ["1.png", "2.png"]}


def test_an_alias_of_a_folder_is_no_kind_of_defect(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/2.png")
    (tmp_path / "alias").symlink_to("good")
    form = read(tmp_path)
    assert names(form) == {"bad": ["2.png"], "good": ["1.png"]}
    assert "alias/ (" not in form.remarks[0]


def write_arrays(folder: Path, *arrays: np.ndarray, suffix: str = "png") -> None:
    """Write images named 1, 2, ... as cameras number them."""
    for number, array in enumerate(arrays, start=1):
        save_picture(folder / f"{number}.{suffix}", array)


@pytest.fixture
def silhouettes() -> list[np.ndarray]:
    """Return photographs against a light: nearly only black and white."""
    rows, columns = np.mgrid[:60, :60]
    discs = [(rows - 30) ** 2 + (columns - 25 - n) ** 2 < 200 for n in range(4)]
    return [np.where(disc, 3, 252).astype(np.uint8) for disc in discs]


def test_silhouettes_with_the_names_of_others_are_photographs(
    tmp_path: Path, silhouettes: list[np.ndarray]
) -> None:
    write_arrays(tmp_path / "good", *silhouettes)
    write_arrays(tmp_path / "bad", *silhouettes[:2])
    assert {kind: len(images) for kind, images in names(read(tmp_path)).items()} == {
        "good": 4,
        "bad": 2,
    }
    write_arrays(tmp_path / "bent", *silhouettes[1:3])  # bad and bent share names as well
    assert not read(tmp_path).mask_folders


def test_silhouettes_of_normal_objects_are_photographs(
    tmp_path: Path, silhouettes: list[np.ndarray]
) -> None:
    """A second camera against a light shows normal objects too, which have no masks."""
    write(tmp_path, *(f"good/{n}.png" for n in range(1, 5)), "bad/1.png")
    write_arrays(tmp_path / "backlight", *silhouettes)
    assert len(names(read(tmp_path))["backlight"]) == 4


def test_dark_photographs_are_no_masks(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/1.png", "bad/2.png")
    write_arrays(tmp_path / "no light", *[np.full((40, 40), n, np.uint8) for n in (0, 2)])
    assert len(names(read(tmp_path))["no light"]) == 2


def test_empty_masks_of_normal_images_are_masks(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/2.png")
    write_arrays(tmp_path / "drawn", np.zeros((40, 40), np.uint8), MASK)
    form = read(tmp_path)
    assert form.mask_folders == [tmp_path / "drawn"]
    assert form.remarks[0] == "drawn/ contains black-and-white images: masks"


@pytest.mark.parametrize("folder", ["masks", "label", "labels", "Annotations", "segmentation"])
def test_masks_saved_as_jpeg(tmp_path: Path, folder: str) -> None:
    write(tmp_path, "good/1.png", "bad/1.png", "bad/2.png")
    rows, columns = np.mgrid[:60, :60]
    discs = [(rows - 30) ** 2 + (columns - 22 - n) ** 2 < 150 for n in (0, 9)]
    write_arrays(tmp_path / folder, *[disc * np.uint8(255) for disc in discs], suffix="jpg")
    masks = [sample.mask for sample in read(tmp_path).labelled if sample.label]
    assert masks == [tmp_path / folder / "1.jpg", tmp_path / folder / "2.jpg"]


@pytest.mark.parametrize("folder", ["label", "labels", "seg"])
def test_photographs_in_a_folder_called_labels_are_a_kind_of_defect(
    tmp_path: Path, folder: str
) -> None:
    write(tmp_path, "good/1.png", "bad/1.png", f"{folder}/1.png")
    assert names(read(tmp_path)) == {"good": ["1.png"], "bad": ["1.png"], folder: ["1.png"]}


@pytest.mark.parametrize("folder", ["mask", "Masks", "ground_truth"])
def test_photographs_in_a_folder_called_masks_are_refused_whatever_their_names(
    tmp_path: Path, folder: str
) -> None:
    write(tmp_path, "good/1.png", "bad/1.png", f"{folder}/1.png")
    with pytest.raises(ValueError, match="should contain masks, but its images are photographs"):
        read(tmp_path)


def test_masks_of_several_kinds_in_folders_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "cut/1.png", "burnt/1.png")
    write(tmp_path, "burnt_mask/1.png", "gt_cut/1.png", mask=True)
    masks = {s.defect: s.mask for s in read(tmp_path).labelled if s.label}
    assert masks == {
        "cut": tmp_path / "gt_cut" / "1.png",
        "burnt": tmp_path / "burnt_mask" / "1.png",
    }


def test_numbers_of_classes_are_masks(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/1.png")
    classes = np.zeros((40, 40), np.uint8)
    classes[5:20, 5:20], classes[25:35, 5:20] = 1, 2
    write_arrays(tmp_path / "labels", classes)
    assert read(tmp_path).has_masks


def test_labels_next_to_a_training_folder_are_masks(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "test/good/2.png", "test/bad/1.png")
    write(tmp_path, "labels/bad/1.png", mask=True)
    form = read(tmp_path)
    assert form.has_masks
    assert not any("not used" in remark for remark in form.remarks)


# -- masks of images at any depth ----------------------------------------------------------------


@pytest.mark.parametrize("places", ["labels/cam{}", "bad_mask/cam{}", "bad/labels/cam{}"])
def test_folders_of_masks_by_other_names_at_any_depth(tmp_path: Path, places: str) -> None:
    write(tmp_path, "good/1.png", *(f"bad/cam{n}/{i}.png" for n in (1, 2) for i in (1, 2)))
    masks = [tmp_path / places.format(n) / f"{i}_GT.jpg" for n in (1, 2) for i in (1, 2)]
    for number, mask in enumerate(masks):
        write_arrays(mask.parent, np.roll(MASK, number, 0), suffix="jpg")
        (mask.parent / "1.jpg").rename(mask)
    form = read(tmp_path)
    assert [s.mask for s in form.labelled if s.label] == masks
    assert names(form) == {"bad": ["1.png", "2.png", "1.png", "2.png"], "good": ["1.png"]}


@pytest.mark.parametrize("place", ["good/cam1", "OK/cam1", "cam1", "good", "."])
def test_masks_of_normal_images_at_any_depth(tmp_path: Path, place: str) -> None:
    write(tmp_path, "good/cam1/1.png", "bad/2.png")
    mask = tmp_path / "ground_truth" / place / "1_MASK.png"
    write(tmp_path, str(mask.relative_to(tmp_path)), "ground_truth/bad/2.png", mask=True)
    assert read(tmp_path).normal_masks == {mask}


def test_masks_of_another_kind_are_none_of_normal_images(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/2.png")
    write(tmp_path, "ground_truth/bent/1.png", "ground_truth/bad/2.png", mask=True)
    assert read(tmp_path).normal_masks == set()


def test_names_in_another_case_come_second(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/a.png", "bad/A.png", "bad/B.png")
    write(tmp_path, "masks/a_mask.png", "masks/A_mask.png", "masks/b_mask.png", mask=True)
    masks = {s.image.name: s.mask.name for s in read(tmp_path).labelled if s.mask}
    assert masks == {"a.png": "a_mask.png", "A.png": "A_mask.png", "B.png": "b_mask.png"}


def test_photographs_in_inner_folders_called_masks_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "good/1.png", "bad/cam1/1.png", "bad/cam1/masks/1.png")
    with pytest.raises(ValueError, match=r"cam1/masks: a folder of this name should contain masks"):
        read(tmp_path)


def test_masks_inside_of_training_images_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "train/good/1.png")
    write(tmp_path, "train/good/masks/1.png", mask=True)
    form = read(tmp_path)
    assert [s.image.name for s in form.train] == ["1.png"]
    assert form.remarks[-1].startswith("not used: masks of images that are not defective")
