"""Tests of the images that are held out of a fit, and of those that are calibrated on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.data.calibration_images import HoldOut, draw_key


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
    with pytest.raises(ValueError, match=r"too few normal images \(1\)"):
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
