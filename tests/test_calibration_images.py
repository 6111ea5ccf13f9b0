"""Tests of the images that are held out of a fit, and of those that are calibrated on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.data import Demo, ImageFolder, MVTecAD
from anomaly_clip.data.calibration_images import HoldOut, draw_key
from anomaly_clip.data.file_hashes import pixel_hashes
from anomaly_clip.records import LoaderNeeds
from anomaly_clip.synthesis.synthesizer import SynthesisSettings


def photographs(folder: Path, count: int, start: int = 0) -> Path:
    """Write distinct images, all normal."""
    for number in range(start, start + count):
        image = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        save_picture(folder / "good" / f"{number:03d}.png", image)
    return folder


def held_names(root: Path, num_needed: int = 19, seed: int = 0, **options: object) -> list[str]:
    data = ImageFolder(str(root), **options)  # type: ignore[arg-type]
    data.begin_fit()
    data.calibration.hold_out = HoldOut(num_needed, seed)
    rows = data.listing.all_rows(data.category, "train")
    trained = data.listing.rows(data.category, "train")
    held = data.calibration.held_out(data.category, rows)
    assert {*trained} == {*rows} - held
    return sorted(sample.image.name for sample in held)


@pytest.mark.parametrize(
    ("count", "needed", "expected"),
    [
        (40, 19, 19),  # what the rate needs
        (200, 19, 40),  # 20 %
        (30, 19, 15),  # at most half
        (30, 59, 15),
        (2, 19, 1),
    ],
)
def test_number_of_images_held_out(tmp_path: Path, count: int, needed: int, expected: int) -> None:
    assert len(held_names(photographs(tmp_path, count), needed)) == expected


def test_generated_images_are_new_to_a_fit_on_another_data_set() -> None:
    small: dict[str, Any] = {"categories": ["pink pill"], "num_train": 3, "picture_size": 64}
    alone, data = Demo(**small), Demo(**small, auxiliary=Demo(**small, seed=9))
    with patch.object(Demo, "needs", LoaderNeeds(is_fitted=True)):
        for hold_out in (None, HoldOut(2, 0)):
            data.calibration.request(hold_out)
            assert len(data.calibration.samples()) == 3
        with pytest.raises(ValueError, match="nothing tells which were fitted on"):
            alone.calibration.samples()


def test_choice_depends_on_seed_and_content_alone(tmp_path: Path) -> None:
    root = photographs(tmp_path / "a", 30)
    chosen = held_names(root, 10)
    assert chosen != held_names(root, 10, seed=1)
    moved = tmp_path / "b" / "good"
    moved.mkdir(parents=True)
    for file in (root / "good").iterdir():
        shutil.copy(file, moved / f"renamed {file.name}")
    assert held_names(moved.parent, 10) == [f"renamed {name}" for name in chosen]
    more = held_names(photographs(root, 5, start=100), 10)
    assert len({*chosen} & {*more}) >= 7  # new images take the place of a few, and move no other


def test_copies_and_groups_stay_together(tmp_path: Path) -> None:
    root = photographs(tmp_path / "copies", 20)
    for number in range(20):
        shutil.copy(root / "good" / f"{number:03d}.png", root / "good" / f"again-{number:03d}.png")
    held = held_names(root, 20)
    assert len(held) == 20
    assert {name.removeprefix("again-") for name in held} == {n for n in held if "again" not in n}
    root = photographs(tmp_path / "groups", 20)
    held = held_names(root, 8, group=r"^\d(\d)")
    tens = {name[1] for name in held}
    assert all(len([name for name in held if name[1] == ten]) == 10 for ten in tens)


@pytest.mark.parametrize(("train_categories", "num_held"), [("same", 5), ("others", 0)])
def test_only_categories_of_the_fit_hold_images_out(
    tmp_path: Path, train_categories: str, num_held: int
) -> None:
    for number, category in enumerate(("nut", "screw")):
        photographs(tmp_path / category / "train", 10, start=10 * number)
        photographs(tmp_path / category / "test", 1, start=50 + number)
    options = {"categories": ["nut"], "train_categories": train_categories}
    data = MVTecAD(str(tmp_path), **options)  # type: ignore[arg-type]
    data.calibration.request(HoldOut(5, 0))
    rows = data.listing.all_rows("nut", "train")
    assert len(data.calibration.held_out("nut", rows)) == num_held


def test_a_single_image_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 0 may be held out"):
        held_names(photographs(tmp_path, 1))


def test_draw_key_is_stable() -> None:
    assert draw_key("a", 0).hex()[:8] == "4c8b0375"  # or older calibrations could not be repeated
    assert draw_key("a", 0) != draw_key("a", 1)


def test_data_without_training_images_say_so(tmp_path: Path) -> None:
    save_picture(tmp_path / "bottle" / "test" / "good" / "0.png")
    data = MVTecAD(str(tmp_path))
    with pytest.raises(ValueError, match="no normal training images to calibrate on"):
        data.normal_images("bottle")


def test_unlabelled_images_need_a_word(tmp_path: Path) -> None:
    save_picture(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"set --data\.normal all"):
        ImageFolder(str(tmp_path)).normal_images("x")
    assert len(ImageFolder(str(tmp_path), normal="all").normal_images("x")) == 1


def test_groups_that_cannot_be_divided(tmp_path: Path) -> None:
    root = photographs(tmp_path, 12)
    with pytest.raises(ValueError, match=r"12 normal images in 1 group, of which at most 6 may"):
        held_names(root, group=r"^(\d)")
    data = ImageFolder(str(root), group=r"^\d(\d)")
    data.begin_fit()
    data.calibration.request(HoldOut(0, 0, (None, 2)))  # the fit on all images
    assert len(data.listing.rows(data.category, "train")) == 12
    data.calibration.request(HoldOut(0, 0, (None, 3)))
    with pytest.raises(ValueError, match="12 normal images in 2 groups cannot be divided into 3 f"):
        data.listing.rows(data.category, "train")


def test_the_start_line_tells_of_groups(tmp_path: Path) -> None:
    data = ImageFolder(str(photographs(tmp_path, 12)), group=r"^\d(\d)")
    data.begin_fit()
    assert "data.group is not used" in data.summary("fit")
    data.calibration.request(HoldOut(1, 0))
    assert "data.group matches 12 of 12 normal images, in 2 groups" in data.summary("fit")


def test_images_in_groups_of_the_fit_are_not_calibrated_on(tmp_path: Path) -> None:
    root = photographs(tmp_path, 30)
    data = ImageFolder(str(root), group=r"^\d(\d)")  # three groups of ten
    rows = data.normal_images(data.category)
    hashes = data.calibration.keys(rows)
    for numbers, num_left in (((3,), 20), ((3, 17), 10)):
        fitted = frozenset(hashes[rows[number]] for number in numbers)
        needs = LoaderNeeds(8, is_fitted=True, fitted_images=fitted)
        with patch.object(ImageFolder, "needs", needs):
            left = data.calibration.samples()
        assert len(left) == num_left
        assert {s.image.name[1] for s in left}.isdisjoint({str(n // 10) for n in numbers})
        remark = f"{30 - num_left - len(numbers)} images in groups (data.group) of images of the"
        assert remark in data.calibration.remarks[0]
    needs = replace(needs, fitted_images=frozenset(hashes[rows[n]] for n in (0, 10, 20)))
    with (
        patch.object(ImageFolder, "needs", needs),
        pytest.raises(ValueError, match="or are in groups of such images"),
    ):
        data.calibration.samples()


def test_a_resumed_fit_needs_new_images_to_calibrate_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path, 12)
    data = ImageFolder(str(root))
    data.begin_fit()
    data.calibration.request(HoldOut(4, 0))
    rows = data.listing.all_rows(data.category, "train")
    held = [*data.calibration.keys([*data.calibration.held_out(data.category, rows)]).values()]
    assert len(held) == 4
    data.calibration.compare(frozenset())
    assert capsys.readouterr().err == ""
    data.calibration.compare(frozenset(held[:3]))
    assert "3 of 4 images held out were fitted on before" in capsys.readouterr().err
    with pytest.raises(ValueError, match="all 4 images held out to calibrate on were fitted on"):
        data.calibration.compare(frozenset(held))


def test_images_held_out_for_the_test_are_told(tmp_path: Path) -> None:
    root = photographs(tmp_path, 10)
    save_picture(root / "scratch" / "0.png")
    data = ImageFolder(str(root))
    assert "held out for the test" not in data.summary("predict")
    data.calibration.is_scored = True
    number = 10 - len(data.normal_images(data.category))
    assert number
    images = "1 normal image is" if number == 1 else f"{number} normal images are"
    text = f"{images} held out for the test (about 0.2"
    assert text in data.summary("predict")


def test_images_that_selected_the_weights_are_not_calibrated_on(tmp_path: Path) -> None:
    root = photographs(tmp_path, 6)
    hashes = pixel_hashes(sorted((root / "good").iterdir()))
    fitted, validated = frozenset([*hashes.values()][:2]), frozenset([*hashes.values()][2:4])
    needs = LoaderNeeds(is_fitted=True, fitted_images=fitted, validated_images=validated)
    data = ImageFolder(str(root), category="nut")
    module = SimpleNamespace(loader_needs=needs)
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    assert [sample.image.name for sample in data.calibration.samples()] == ["004.png", "005.png"]


def test_a_fit_tells_which_images_selected_its_weights(tmp_path: Path) -> None:
    options = {"val_split": "synthetic", "val_share": 0.25, "synthesis": SynthesisSettings("nsa")}
    data = ImageFolder(str(photographs(tmp_path, 8)), **options)  # type: ignore[arg-type]
    data.begin_fit()
    hashes = data.leakage.validation_hashes()
    assert len(hashes) == 2
    assert not hashes & data.leakage.training_hashes()
    assert len(hashes | data.leakage.training_hashes()) == 8
