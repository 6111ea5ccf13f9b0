"""Files as people have them, saved in the working folder; for ``test_field.py``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_images import tiff

Build = Callable[[], object]
MASK = "data/plate/ground_truth/cut/3_mask.png"


def pixels(seed: int, side: int = 40) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def photos(folder: str, count: int = 6, seed: int = 0, suffix: str = "png", side: int = 40) -> None:
    """Save photographs of noise, all different."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(pixels(1000 * seed + number, side))
        image.save(Path(folder, f"{number}.{suffix}"))


def camera(folder: str, bits: int, suffix: str = "png", colour: bool = False) -> None:
    """Save 16-bit images of a camera with fewer bits."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed in range(6):
        shape = (40, 40, 3) if colour else (40, 40)
        values = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint16)
        values[0, 0] = 2**bits - 1
        cv2.imwrite(f"{folder}/{seed}.{suffix}", values)


def square(side: int = 40, value: int = 255, inverted: bool = False) -> NDArray[np.uint8]:
    mask = np.zeros((side, side), np.uint8)
    mask[4:10, 5:12] = value
    return value - mask if inverted else mask


def masks(
    folder: str,
    count: int = 4,
    suffix: str = "png",
    ending: str = "",
    make: Callable[[], NDArray[np.uint8]] = square,
    **options: Any,
) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(make())
        image.save(Path(folder, f"{number}{ending}.{suffix}"), **options)


def labelled(root: str = "data", side: int = 40) -> None:
    photos(f"{root}/good", 8, side=side)
    photos(f"{root}/cut", 4, seed=1, side=side)


def mvtec(root: str = "data", category: str = "plate", *, with_masks: bool = False) -> None:
    photos(f"{root}/{category}/train/good", 6)
    photos(f"{root}/{category}/test/good", 4, seed=1)
    photos(f"{root}/{category}/test/cut", 4, seed=2)
    if with_masks:
        masks(f"{root}/{category}/ground_truth/cut", ending="_mask")


def all_of(*builds: Build) -> Build:
    def build() -> None:
        for part in builds:
            part()

    return build


def truncate(path: str, share: float = 0.5) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])


def line_scan(path: str, width: int = 40, height: int = 16_000) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (1, width, 3), dtype=np.uint8)
    Image.fromarray(np.repeat(rows, height, axis=0)).save(path)


def with_text(text: str, compressed: bool, count: int = 1) -> None:
    photos("data/good")
    for path in sorted(Path("data/good").iterdir()):
        texts = PngInfo()
        for number in range(count):
            texts.add_text(f"workflow {number}", text, zip=compressed)
        with Image.open(path) as image:
            image.save(path, pnginfo=texts)


def with_exif(size: int) -> None:
    photos("data/good", suffix="jpg")
    for path in sorted(Path("data/good").iterdir()):
        exif = Image.Exif()
        exif[0x010E] = "x" * size
        with Image.open(path) as image:
            image.save(path, exif=exif)


def silhouettes(folder: str, count: int = 4) -> None:
    """Save photographs that are nearly black and white, of another size and shape each."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = np.zeros((40, 40), np.uint8)
        image[2 + number : 36, 3 : 30 + 2 * number] = (
            250 - np.arange(27 + 2 * number, dtype=np.uint8) % 9
        )
        Image.fromarray(image).save(Path(folder, f"part {number}.png"))


def with_masks(**options: Any) -> Build:
    return all_of(labelled, partial(masks, "data/ground_truth/cut", ending="_mask", **options))


inverted = with_masks(make=partial(square, inverted=True))
jpeg = with_masks(suffix="jpg", quality=60)


def blurred_square() -> NDArray[np.uint8]:
    return np.asarray(cv2.GaussianBlur(square(), (0, 0), 2), np.uint8)


blurred = with_masks(make=blurred_square)


def transparent() -> NDArray[np.uint8]:
    return np.dstack([np.zeros((40, 40, 3), np.uint8), square()])


alpha = with_masks(make=transparent)


def inverted_mvtec() -> None:
    mvtec()
    masks("data/plate/ground_truth/cut", ending="_mask", make=partial(square, inverted=True))


def mvtec_gt() -> None:
    mvtec()
    masks("data/plate/ground_truth/cut", ending="_gt")


def spoil_two() -> None:
    Path("new/1.png").write_bytes(b"")
    Path("new/4.png").write_text("hello")


def copy_to_test(damaged: bool) -> None:
    photos("other/good", 4, 7)
    photos("other/cut", 4, 8)
    if damaged:
        truncate("other/cut/0.png")


def int32_images() -> None:
    """Save grey images of 32 bits with values above 16 bits."""
    Path("data/good").mkdir(parents=True)
    for seed in range(6):
        values = np.random.default_rng(seed).integers(0, 100_000, (40, 40), dtype=np.int32)
        Image.fromarray(values).save(f"data/good/{seed}.tif")


def brighter_test_image() -> None:
    for split, kind in (("train", "good"), ("test", "good"), ("test", "cut")):
        camera(f"data/plate/{split}/{kind}", 12)
        for path in sorted(Path(f"data/plate/{split}/{kind}").iterdir()):
            values = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
            values[1, 1:4] = len(kind), len(split), int(path.stem)  # no duplicates
            cv2.imwrite(str(path), values)
    bright = np.full((40, 40), 60_000, np.uint16)
    cv2.imwrite("data/plate/test/cut/bright.png", bright)


def planes() -> None:
    """Save 16-bit colours in separate planes, without compression."""
    photos("data/good")
    values = np.random.default_rng(0).integers(0, 4096, (40, 40, 3), dtype=np.uint16)
    Path("data/good/planes.tif").write_bytes(tiff(values, planar=2))


def named_masks(ending: str) -> None:
    labelled()
    masks("data/ground_truth/cut", ending=ending)


def sized_masks(side: int) -> None:
    """Save images of 120 pixels with masks of another size."""
    labelled(side=120)
    masks("data/ground_truth/cut", make=partial(square, side))


def ksdd2_copies() -> None:
    """Save images with masks as KolektorSDD2 is published, with the copies of its archive."""
    for split, seed in (("train", 0), ("test", 1)):
        photos(f"data/{split}", 6, seed)
        masks(f"data/{split}", 6, ending="_GT", make=partial(square, 40, 0))
    masks("data/test", 2, ending="_GT")
    for name in ("0", "0_GT"):
        shutil.copy(f"data/train/{name}.png", f"data/train/{name} (copy).png")


def mvtec_copies() -> None:
    mvtec()
    for name in ("0 (copy)", "0 - Copy", "Copy of 0", "0 (1)"):
        shutil.copy("data/plate/train/good/0.png", f"data/plate/train/good/{name}.png")


def other_content() -> None:
    mvtec()
    shutil.copy("data/plate/test/cut/0.png", "data/plate/train/good/0 (copy).png")
    Image.fromarray(pixels(77)).save("data/plate/train/good/0 (copy).png")


def loco() -> None:
    mvtec()
    for kind in ("logical_anomalies", "structural_anomalies"):
        photos(f"data/plate/test/{kind}", 2, 8)
        for number in range(2):
            masks(f"data/plate/ground_truth/{kind}/{number}", 1, ending="00")
    Path("data/plate/defects_config.json").write_text("[]")


def kolektor() -> None:
    for number in range(3):
        folder = f"data/kos0{number + 1}"
        photos(folder, 4, number, "jpg")
        masks(folder, 4, "bmp", "_label", partial(square, 40, 0))
        for path in sorted(Path(folder).iterdir()):
            path.rename(path.with_name(f"Part{path.name}"))


def mvtec_ad_2() -> None:
    photos("data/can/train/good", 6)
    photos("data/can/validation/good", 2, 1)
    photos("data/can/test_public/good", 2, 2)
    photos("data/can/test_public/bad", 2, 3)
    masks("data/can/test_public/ground_truth/bad", 2, ending="_mask")


def normal_masks(value: int) -> None:
    mvtec()
    masks("data/plate/ground_truth/cut", ending="_mask")
    masks("data/plate/ground_truth/good", ending="_mask", make=partial(square, 40, value))


def own_normal_masks() -> None:
    labelled()
    masks("data/ground_truth/cut", ending="_mask")
    masks("data/ground_truth/good", 8, ending="_mask")


def rename(stem: bytes) -> None:
    os.rename(b"new/0.png", b"new/" + stem + b".png")


def linked() -> None:
    photos("data/good")
    photos("elsewhere", 6, 5)
    Path("data/good/shift2").symlink_to(Path("elsewhere").resolve())


def loop() -> None:
    photos("data/good")
    Path("data/good/again").symlink_to(Path("data").resolve())


def linked_image() -> None:
    photos("data/good")
    photos("elsewhere", 1, 5)
    Path("data/good/linked.png").symlink_to(Path("elsewhere/0.png").resolve())


def broken_link() -> None:
    photos("data/good")
    Path("data/good/lost.png").symlink_to("nowhere.png")


def system(folder: str) -> None:
    photos("data/good")
    photos(folder, 2, 9)


def folder_png() -> None:
    photos("data/good")
    Path("data/good/folder.png").mkdir()


def pipe() -> None:
    photos("data/good")
    os.mkfifo("data/good/pipe.png")


def two_folders() -> None:
    photos("data/good")
    photos("new", 6, 4)


def configuration(encoding: str) -> None:
    photos("data/good")
    lines = [f"# configuration für {Path.cwd().name}", "trainer: {accelerator: cpu}"]
    lines += ["model:", "  class_path: PatchCore", "  init_args:", "    image_size: 32"]
    lines += ["    layers: [features.4]", "    backbone: {name: squeezenet1_1, weights: random}"]
    lines += ["data:", "  class_path: ImageFolder", "  init_args: {root: data, num_workers: 0}"]
    Path("c.yaml").write_text("\n".join(lines), encoding=encoding)
