"""Folders that pages of the documentation name: ``<!-- run: NAME -->`` puts one into its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from layouts import btad, mixed_wm38, visa
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.demo.photographs import draw_photograph

NUM_GOOD = 40
SIDE = 64
PLANK = "oak"


def photograph(file: Path, index: int, defect: str = "good") -> NDArray[np.uint8]:
    """Save a generated photograph of a plank; return its mask of 0 and 255."""
    drawn = draw_photograph(PLANK, 0, index, defect, SIDE)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn.image).save(file)
    return (np.asarray(drawn.mask) > 0).astype(np.uint8) * 255


def photos(folder: Path) -> None:
    """``photos/``: 40 images in ``good/``, 4 in ``hole/`` and in ``stain/`` each, with masks."""
    for number in range(NUM_GOOD):
        photograph(folder / "photos" / "good" / f"IMG_{number:04d}.JPG", number)
    for first, defect in ((100, "hole"), (200, "stain")):
        for number in range(first, first + 4):
            stem = f"IMG_{number:04d}"
            mask = photograph(folder / "photos" / defect / f"{stem}.JPG", number, defect)
            file = folder / "photos" / "ground_truth" / defect / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)


def few_photos(folder: Path) -> None:
    """``few_photos/``: 8 images in ``good/``."""
    for number in range(280, 288):
        photograph(folder / "few_photos" / "good" / f"IMG_{number:04d}.JPG", number)


def good_photos(folder: Path) -> None:
    """``good_photos/``: 40 normal images without subfolders."""
    for number in range(300, 300 + NUM_GOOD):
        photograph(folder / "good_photos" / f"IMG_{number:04d}.JPG", number)


def parts(folder: Path) -> None:
    """``parts/good/``: 40 normal images."""
    for number in range(800, 800 + NUM_GOOD):
        photograph(folder / "parts" / "good" / f"IMG_{number:04d}.JPG", number)


def more_good_photos(folder: Path) -> None:
    """``more_good_photos/``: 120 further normal images, enough for a rate of 1 %."""
    for number in range(400, 520):
        photograph(folder / "more_good_photos" / f"IMG_{number:04d}.JPG", number)


def new_photos(folder: Path) -> None:
    """``new_photos/``: 6 unsorted images, the last two with a hole."""
    for number in range(600, 606):
        defect = "hole" if number > 603 else "good"
        photograph(folder / "new_photos" / f"IMG_{number - 600:04d}.JPG", number, defect)


def new(folder: Path) -> None:
    """``new/``: 3 unsorted images, one of them with a stain."""
    for number in range(650, 653):
        defect = "stain" if number == 652 else "good"
        photograph(folder / "new" / f"IMG_{number - 650:04d}.JPG", number, defect)


def photo(folder: Path) -> None:
    """``photo.jpg``: one image with a stain."""
    photograph(folder / "photo.jpg", 700, "stain")


def magnetic_tile(folder: Path) -> None:
    """``magnetic_tile/``: grey tiles in the layout of MVTec-AD."""
    write_mvtec(folder / "magnetic_tile", ("magnetic_tile",), 4)


def noise(file: Path, rng: np.random.Generator, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


def mvtec(folder: Path) -> None:
    """``mvtec_ad/``: bottle, metal_nut and screw in MVTec-AD's layout, 24 images to train."""
    write_mvtec(folder / "mvtec_ad", ("bottle", "metal_nut", "screw"), 24)


def write_mvtec(root: Path, categories: Sequence[str], num_train: int) -> None:
    """Write categories with training images, 2 normal test images and 2 with a scratch."""
    rng = np.random.default_rng(0)
    for category in categories:
        for number in range(num_train):
            noise(root / category / "train" / "good" / f"{number:03d}.png", rng)
        for number in range(2):
            noise(root / category / "test" / "good" / f"{number:03d}.png", rng)
            noise(root / category / "test" / "scratch" / f"{number:03d}.png", rng)
            mask = np.zeros((40, 48), np.uint8)
            mask[8:20, 10:30] = 255
            file = root / category / "ground_truth" / "scratch" / f"{number:03d}_mask.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)


def meta_json(folder: Path) -> None:
    """``meta_json/``: a data set described by a ``meta.json``, as CLIP methods publish theirs."""
    write_meta_json(folder / "meta_json", ("candle", "cashew"), seed=1)


def other_meta_json(folder: Path) -> None:
    """``other_meta_json/``: another such data set, to train on."""
    write_meta_json(folder / "other_meta_json", ("bottle", "carpet"), seed=2)


def write_meta_json(root: Path, categories: Sequence[str], seed: int) -> None:
    """Write categories with 8 training images, and 3 normal and 3 anomalous test images."""
    rng = np.random.default_rng(seed)
    listing: dict[str, dict[str, list[dict[str, object]]]] = {"train": {}, "test": {}}
    for category in categories:
        for split, label, number in (
            *(("train", 0, n) for n in range(8)),
            *(("test", 0, n) for n in range(8, 11)),
            *(("test", 1, n) for n in range(11, 14)),
        ):
            image = f"{category}/{split}/{number:03d}.png"
            noise(root / image, rng)
            mask = ""
            if label:
                mask = f"{category}/masks/{number:03d}.png"
                (root / mask).parent.mkdir(parents=True, exist_ok=True)
                square = np.zeros((40, 48), np.uint8)
                square[8:20, 10:30] = 255
                Image.fromarray(square).save(root / mask)
            listing[split].setdefault(category, []).append(
                {
                    "img_path": image,
                    "mask_path": mask,
                    "cls_name": category,
                    "specie_name": "damage" if label else "good",
                    "anomaly": label,
                }
            )
    (root / "meta.json").write_text(json.dumps(listing))


def factory(folder: Path) -> None:
    """``factory/``: photographs of a product in ``ok/`` and ``ng/``."""
    for split, label, numbers in (
        ("train", "ok", range(6)),
        ("test", "ok", range(10, 12)),
        ("test", "ng", range(20, 22)),
    ):
        for number in numbers:
            defect = "hole" if label == "ng" else "good"
            file = folder / "factory" / "plank" / split / label / f"{number:03d}.jpg"
            photograph(file, number, defect)


def examples(folder: Path) -> None:
    """The files of ``examples/`` themselves."""
    source = Path(__file__).resolve().parent.parent / "examples"
    for file in (*source.glob("*.py"), *source.glob("*.yaml")):
        shutil.copy(file, folder)


def _in(name: str, make: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Return a maker of a folder from a writer of a small data set."""

    def put_there(folder: Path) -> None:
        make(folder / name)

    return put_there


FIXTURES: dict[str, Callable[[Path], None]] = {
    "photos": photos,
    "few_photos": few_photos,
    "good_photos": good_photos,
    "more_good_photos": more_good_photos,
    "parts": parts,
    "new_photos": new_photos,
    "new": new,
    "magnetic_tile": magnetic_tile,
    "wafers": _in("", mixed_wm38),
    "photo": photo,
    "mvtec": mvtec,
    "visa": _in("visa", visa),
    "btad": _in("btad", btad),
    "meta_json": meta_json,
    "other_meta_json": other_meta_json,
    "factory": factory,
    "examples": examples,
}
"""Makers of folders by name. ``/path/to/NAME`` in a page is ``NAME`` in its folder, if there."""


def put(names: str, folder: Path) -> None:
    """Put folders into a page's folder.

    Args:
        names: Names of ``FIXTURES``, separated by commas.
        folder: The page's folder.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names.split(","):
        if name.strip() not in FIXTURES:
            raise ValueError(f"run: {name.strip()}: no such folder; known: {', '.join(FIXTURES)}")
        FIXTURES[name.strip()](folder)
