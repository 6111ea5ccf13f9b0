"""Tiny data sets in the published layouts, with the quirks of the real files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from helpers import save_picture
from numpy.typing import NDArray
from PIL import Image


class Maker:
    """Writer of random images, all different."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def picture(self, path: Path, size: tuple[int, int] = (24, 20), **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = self.rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        if mode := options.pop("mode", None):
            picture = picture.convert(mode)
        picture.save(path, **options)
        return path


def blob(size: tuple[int, int] = (24, 20), value: int = 255) -> NDArray[np.uint8]:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[5:12, 6:15] = value
    return mask


def litter(folder: Path) -> None:
    """Add the stray files of operating systems and archives."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Thumbs.db", ".DS_Store", "license.txt", "._000.png"):
        (folder / name).write_text("not an image")


def visa(root: Path, *, split_file: bool = True) -> Path:
    """Two categories with 3 normal and 2 anomalous images each; masks contain class numbers."""
    make = Maker(1)
    rows = [["object", "split", "label", "image", "mask"]]
    for category in ("candle", "pipe_fryum"):
        inner = f"{category}/Data"
        for number, split in enumerate(("train", "train", "test")):
            image = f"{inner}/Images/Normal/{number:04d}.JPG"
            make.picture(root / image, format="JPEG")
            rows.append([category, split, "normal", image, ""])
        for number in range(2):
            image = f"{inner}/Images/Anomaly/{number:03d}.JPG"
            mask = f"{inner}/Masks/Anomaly/{number:03d}.png"
            make.picture(root / image, format="JPEG")
            save_picture(root / mask, blob(value=number + 1))  # class numbers are nearly black
            rows.append([category, "test", "anomaly", image, mask])
        litter(root / inner / "Images" / "Normal")
    if split_file:
        (root / "split_csv").mkdir()
        with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return root


def btad(root: Path) -> Path:
    """Three products; in one of them, images and masks have different formats."""
    make = Maker(2)
    for category, image, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for name in ("train/ok/0000", "train/ok/0001", "test/ok/0000"):
            make.picture(root / category / f"{name}.{image}")
        for number in range(2):
            make.picture(root / category / "test" / "ko" / f"{number:04d}.{image}")
            save_picture(root / category / "ground_truth" / "ko" / f"{number:04d}.{mask}", blob())
    litter(root / "01" / "train" / "ok")
    return root


def ksdd2(root: Path) -> Path:
    """Three training and two test images, one defective per split; masks differ in size from
    their images."""
    make = Maker(3)
    for split, first, defective in (("train", 10000, (2,)), ("test", 20000, (1,))):
        for number in range(3 if split == "train" else 2):
            stem = root / split / f"{first + number}"
            size = (23, 63)
            make.picture(stem.with_suffix(".png"), size)
            other = (size[0] + 1, size[1] - 2)  # each mask is wider and shorter than its image
            mask = blob(other) if number in defective else np.zeros((other[1], other[0]), np.uint8)
            save_picture(root / split / f"{first + number}_GT.png", mask)
    return root


def industrial_folders(root: Path) -> Path:
    make = Maker(4)
    for name, number in (("Bent Metal Stripe", 3), ("Toy Wheel", 1)):
        for index in range(number):
            make.picture(root / name / f"{index}.png")
    litter(root / "Toy Wheel")
    return root


def isic(root: Path) -> Path:
    make = Maker(5)
    for number in (3, 14):
        stem = f"ISIC_{number:07d}"
        make.picture(root / "ISBI2016_ISIC_Part1_Test_Data" / f"{stem}.jpg")
        save_picture(
            root / "ISBI2016_ISIC_Part1_Test_GroundTruth" / f"{stem}_Segmentation.png", blob()
        )
    return root


def clinic_db(root: Path) -> Path:
    """Three frames and their masks as TIFF files; the masks are grey and have three channels."""
    make = Maker(6)
    for number in (1, 2, 10):
        make.picture(root / "Original" / f"{number}.tif")
        grey = blob(value=255)
        grey[5:12, 6:8] = 100  # below half of white: not part of the defect
        path = root / "Ground Truth" / f"{number}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.stack([grey, grey, grey], axis=2)).save(path)
    return root


def head_ct(root: Path, *, nested: bool = False) -> Path:
    make = Maker(7)
    folder = root / "head_ct" / "head_ct" if nested else root / "head_ct"
    for number in (0, 1, 100, 101):
        mode = "RGBA" if number == 1 else "RGB"
        make.picture(folder / f"{number:03d}.png", mode=mode)
    lines = ["id, hemorrhage", "0, 1", "1, 1", "100, 0", "101, 0"]
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def brain_mri(root: Path) -> Path:
    """Various extensions (one of them wrong), palettes, transparency and a duplicate file."""
    make = Maker(8)
    folder = root / "brain_tumor_dataset"
    make.picture(folder / "no" / "1 no.jpeg", format="JPEG")
    make.picture(folder / "no" / "N1.JPG", format="JPEG", mode="L")
    make.picture(folder / "no" / "No15.jpg", format="PNG")
    make.picture(folder / "yes" / "Y1.jpg", format="JPEG")
    make.picture(folder / "yes" / "Y2.png", mode="P")
    make.picture(folder / "yes" / "Y3.png", mode="RGBA")
    (folder / "yes" / "Y4.jpg").write_bytes((folder / "yes" / "Y1.jpg").read_bytes())
    make.picture(root / "yes" / "Y1.jpg")  # the archive contains a second copy, which is not read
    make.picture(root / "no" / "1 no.jpeg")
    litter(folder / "no")
    return root


def mixed_wm38(root: Path, copies: int = 5) -> Path:
    """Maps of four classes; one map contains a stray 3."""
    rng = np.random.default_rng(9)
    rows = np.zeros((4, 8), int)
    rows[1, 0] = rows[2, 3] = rows[3, 0] = rows[3, 3] = 1
    targets = np.repeat(rows, copies, axis=0)
    maps = rng.integers(0, 3, (len(targets), 52, 52))
    maps[0, 0, 0] = 3
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "MixedWM38.npz", maps, targets)
    return root


def loco(root: Path) -> Path:
    """MVTec LOCO: two categories, several masks per image."""
    make = Maker(10)
    for category in ("breakfast_box", "juice_bottle"):
        folder = root / category
        kinds = ("logical_anomalies", "structural_anomalies")
        for place in ("train/good", "validation/good", "test/good", *(f"test/{k}" for k in kinds)):
            make.picture(folder / place / "000.png")
            make.picture(folder / place / "001.png")
        for kind in kinds:
            for number in ("000", "001"):
                save_picture(folder / "ground_truth" / kind / number / "000.png", blob())
        (folder / "defects_config.json").write_text("[]")
    return root


def kolektor_sdd(root: Path) -> Path:
    """KolektorSDD: items of several photographs, with their masks next to them."""
    make = Maker(11)
    for item in ("kos01", "kos02"):
        for number in range(2):
            make.picture(root / item / f"Part{number}.jpg", format="JPEG")
            mask = blob() if number else np.zeros((20, 24), np.uint8)
            save_picture(root / item / f"Part{number}_label.bmp", mask)
    return root


def mvtec_3d(root: Path) -> Path:
    """MVTec 3D-AD: color images, point clouds and masks."""
    make = Maker(12)
    for place in ("train/good", "validation/good", "test/good", "test/hole"):
        for kind, ending in (("rgb", "png"), ("xyz", "tiff"), ("gt", "png")):
            make.picture(root / "bagel" / place / kind / f"000.{ending}")
    return root


def eyecandies(root: Path) -> Path:
    """Eyecandies: six lightings, depth and normals of each object."""
    make = Maker(13)
    for split in ("train", "val", "test_public"):
        for name in ("image_0", "image_1", "depth", "normals", "mask"):
            make.picture(root / "CandyCane" / split / "data" / f"000_{name}.png")
    return root


def dagm(root: Path) -> Path:
    """DAGM 2007: classes with labels of the defective images."""
    make = Maker(14)
    for split in ("Train", "Test"):
        make.picture(root / "Class1" / split / "0001.PNG")
        make.picture(root / "Class1" / split / "0002.PNG")
        save_picture(root / "Class1" / split / "Label" / "0002_label.PNG", blob())
    return root
