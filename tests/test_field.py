"""Input as people have it, one table row per input: command, exit code, text on the screen.

Each row belongs to a kind of input that users of such tools have reported in public; F01 to F28
number the kinds. Every kind has several rows, because a rule that covers only one input is no rule.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomaly_clip.cli import main

pytestmark = pytest.mark.slow

Build = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One input.

    Args:
        kind: Identifier of the kind of input.
        name: The input.
        build: Makes the files, in the working folder.
        words: The command.
        code: Its exit code.
        shown: Texts on the screen, whose white space is ignored.
        before: Commands that must succeed before, such as a fit.
        hidden: Texts that must not be on the screen.
    """

    kind: str
    name: str
    build: Build
    words: Sequence[str]
    code: int
    shown: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    hidden: Sequence[str] = field(default=("Traceback",))


# -- files -----------------------------------------------------------------------------------------


def pixels(seed: int, side: int = 40) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def photos(folder: str, count: int = 6, seed: int = 0, suffix: str = "png") -> None:
    """Save photographs of noise, all different."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(pixels(1000 * seed + number))
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


def labelled(root: str = "data", *, with_masks: bool = False, normal: str = "good") -> None:
    photos(f"{root}/{normal}", 8)
    photos(f"{root}/cut", 4, seed=1)
    if with_masks:
        masks(f"{root}/ground_truth/cut", ending="_mask")


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


# -- commands --------------------------------------------------------------------------------------

MODEL: tuple[str, ...] = ("--model=PatchCore", "--model.backbone.name=squeezenet1_1")
MODEL += ("--model.backbone.weights=random", "--model.layers=[features.4]", "--model.image_size=32")
RUN = ("--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


def fit(*options: str, data: str = "ImageFolder", root: str = "data") -> list[str]:
    chosen = [f"--data={data}", f"--data.root={root}", *RUN, "--output.folder=fit"]
    return ["fit", *MODEL, *chosen, "--trainer.enable_model_summary=false", *options]


def later(verb: str, *options: str) -> list[str]:
    """Return a test or predict with the checkpoint of :func:`fit`."""
    return [verb, "--ckpt_path=fit/checkpoints/last.ckpt", f"--output.folder={verb}", *options]


def check(*options: str, data: str = "ImageFolder", root: str = "data") -> list[str]:
    return ["check", f"--data={data}", f"--data.root={root}", *options]


MASK = "data/plate/ground_truth/cut/3_mask.png"


def each(data: str, root: str = "data") -> list[str]:
    return ["each", *fit("--output.page=false", data=data, root=root)[1:]]


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


ROWS: list[Row] = [
    # F01: normal images and nothing else
    Row("F01", "MVTec layout without masks, fit", mvtec, fit(data="MVTecAD"), 0, ["6 images"]),
    Row(
        "F01",
        "MVTec layout without masks, test",
        mvtec,
        later("test"),
        0,
        ["image AUROC", "–"],
        [fit(data="MVTecAD")],
    ),
    Row("F01", "good alone", partial(photos, "data/good", 8), fit(), 0, ["good/ (8) is normal"]),
    Row(
        "F01",
        "flat folder of good photographs",
        partial(photos, "data"),
        fit("--data.normal=all"),
        0,
        ["all are normal (data.normal all)"],
    ),
    Row("F01", "flat folder, no option", partial(photos, "data"), fit(), 2, ["--data.normal all"]),
    Row(
        "F01",
        "one mask missing among others",
        all_of(partial(mvtec, with_masks=True), partial(os.remove, MASK)),
        later("test"),
        2,
        ["3.png: its mask is missing"],
        [fit(data="MVTecAD")],
    ),
    Row("F01", "each without masks", mvtec, each("MVTecAD"), 0, ["plate"]),
    # F02: cameras with fewer than 16 bits
    *(
        Row(
            "F02",
            f"{bits} bits in 16, {suffix}{', colour' if colour else ''}",
            partial(camera, "data/good", bits, suffix, colour),
            fit(),
            0,
            [f"6 images with 16 bits per channel: {bits} are used (chosen by the highest value"],
        )
        for bits, suffix, colour in [
            (10, "png", False),
            (12, "tiff", False),
            (12, "png", True),
            (14, "pgm", False),
            (12, "ppm", True),
        ]
    ),
    Row(
        "F02",
        "more bits than at fit",
        all_of(partial(camera, "data/good", 10), partial(camera, "new", 12)),
        later("test", "--data.root=new", "--data.bit_depth=12"),
        2,
        ["data.bit_depth 12 differs from that of the fit (10)"],
        [fit()],
    ),
    Row("F02", "check", partial(camera, "data/good", 12), check(), 0, ["12 are used"]),
    # F10: formats by content
    Row(
        "F10",
        "jfif next to png",
        all_of(
            partial(photos, "data/good", 6),
            partial(photos, "jpeg", 2, 5, "jpg"),
            partial(shutil.move, "jpeg/0.jpg", "data/good/b.jfif"),
            partial(shutil.move, "jpeg/1.jpg", "data/good/noextension"),
        ),
        fit(),
        0,
        ["good/ (8) is normal"],
    ),
    *(
        Row(
            "F10",
            f"a folder of {suffix}",
            partial(photos, "data/good", 6, 0, suffix),
            fit(),
            0,
            ["6 images"],
        )
        for suffix in ("gif", "webp", "jp2", "tga", "dib")
    ),
    *(
        Row(
            "F10",
            f"{name} with the extension of an image",
            all_of(
                partial(photos, "data/good", 6),
                partial(Path("data/good/x.png").write_bytes, content),
            ),
            fit(),
            2,
            ["x.png: not an image but", shown],
        )
        for name, content, shown in [
            ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
            ("PDF", b"%PDF-1.4\n", "PDF"),
            ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("web page", b"<!DOCTYPE html><html></html>", "web page"),
        ]
    ),
    Row(
        "F10",
        "other files are counted",
        all_of(
            partial(photos, "data/good", 6), partial(Path("data/good/notes.txt").write_text, "x")
        ),
        fit(),
        0,
        ["not used: 1 file that is not an image, such as notes.txt"],
    ),
    # F19: large images
    Row(
        "F19",
        "above the limit",
        partial(photos, "data/good"),
        fit("--data.max_pixels=1000"),
        2,
        ["data.max_pixels 1000: raise it", "0.png"],
    ),
    Row(
        "F19",
        "a line scan",
        all_of(partial(photos, "data/good"), partial(line_scan, "data/good/scan.png")),
        fit(),
        0,
        ["aspect ratio by up to 400.00 (40 x 16000 pixels)"],
    ),
    Row(
        "F19",
        "a line scan in TIFF, above PIL's limit",
        all_of(
            partial(photos, "data/good"), partial(line_scan, "data/good/scan.tif", 4096, 45_000)
        ),
        fit(),
        0,
        ["7 images"],
    ),
    Row(
        "F19", "check", partial(photos, "data/good"), check("--data.max_pixels=9"), 1, ["raise it"]
    ),
    # F26: texts in images
    *(
        Row(
            "F26",
            name,
            partial(
                make,
            ),
            fit(),
            0,
            ["6 images"],
        )
        for name, make in [
            ("a long text in a PNG", partial(with_text, "x" * 3_000_000, True)),
            ("a long text, not compressed", partial(with_text, "x" * 3_000_000, False)),
            ("many texts", partial(with_text, "x" * 900_000, True, 90)),
            ("a large EXIF block", partial(with_exif, 60_000)),
        ]
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.name}".replace(" ", "-"))
def test_input_as_people_have_it(
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    row.build()
    for words in row.before:
        assert main(list(words)) == 0, words
    capsys.readouterr()
    code = main(list(row.words))
    screen = " ".join("".join(capsys.readouterr()).split())
    assert code == row.code, screen
    for text in row.shown:
        assert text in screen, screen
    for text in row.hidden:
        assert text not in screen, screen


def test_every_kind_has_several_rows() -> None:
    kinds = [row.kind for row in ROWS]
    assert {kind: kinds.count(kind) for kind in set(kinds) if kinds.count(kind) < 4} == {}
