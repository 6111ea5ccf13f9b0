"""Bit depth, size, frames and distortion of a data set's images, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.data.distortion import distortion
from anomaly_clip.data.transforms import Resize

FIT = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
FIT += ["--data=ImageFolder", "--data.num_workers=0", "--trainer.accelerator=cpu"]
CHECKPOINT = "--ckpt_path=fit/checkpoints/last.ckpt"


def camera_images(folder: Path, count: int, bits: int, seed: int = 0) -> None:
    """Save grey noise of a camera, of which one pixel has the highest value, in 16-bit PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        values = rng.integers(0, 2**bits - 2**8, (40, 40), dtype=np.uint16)
        values[0, 0] = 2**bits - 1
        cv2.imwrite(str(folder / f"{seed}_{number}.png"), values)


def values_of(path: Path) -> np.ndarray:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))


def scores(folder: str) -> dict[str, float]:
    with Path(folder, "scores.csv").open() as file:
        return {Path(row["path"]).stem: float(row["image_score"]) for row in csv.DictReader(file)}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_the_depth_of_a_camera_is_chosen_at_fit_and_kept(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores equal those of the same images with 8 bits, for which no choice is needed."""
    bits = 12
    camera_images(workplace / "parts" / "good", 25, bits)
    camera_images(workplace / "new", 1, bits, seed=1)
    dark = values_of(Path("new/1_0.png")) // 4
    cv2.imwrite("new/dark.png", dark)  # this image alone would give another depth
    full = 2**bits - 1
    for path in [*Path("parts/good").iterdir(), *Path("new").iterdir()]:
        values = values_of(path).astype(float)
        copy = Path("eight", path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.floor(values / full * 255 + 0.5).astype(np.uint8)).save(copy)
    assert main(["fit", *FIT, "--data.root=parts", "--output.folder=fit"]) == 0
    remark = f"25 images with 16 bits per channel: {bits} are used (chosen by the highest value"
    assert remark in one_line(capsys)
    saved = torch.load("fit/checkpoints/last.ckpt", weights_only=True)
    assert saved["bit_depth"] == bits
    predict = ["predict", CHECKPOINT, "--output.maps=false"]
    assert main([*predict, "--data.root=new", "--output.folder=deep"]) == 0
    assert f"2 images with 16 bits per channel: {bits} are used (as in the fit)" in one_line(capsys)
    assert main([*predict, "--data.root=eight/new", "--output.folder=plain"]) == 0
    deep, plain = scores("deep"), scores("plain")
    assert deep == pytest.approx(plain, rel=1e-6)
    protocol = json.loads(Path("deep/predict.json").read_text())["run"]["protocol"]
    assert protocol["bit_depth"] == bits


@pytest.mark.slow
def test_brighter_images_than_the_fit_allows_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    camera_images(workplace / "parts" / "good", 25, 10)
    camera_images(workplace / "parts" / "scratch", 2, 12, seed=1)
    assert main(["fit", *FIT, "--data.root=parts", "--output.folder=fit"]) == 0
    capsys.readouterr()
    assert main(["test", CHECKPOINT, "--output.folder=test"]) == 2
    message = one_line(capsys)
    assert "1_0.png: its values reach 4095, but 10 bits end at 1023: set data.bit_depth" in message
    assert not Path("test").exists()
    words = ["test", CHECKPOINT, "--data.bit_depth=12", "--output.folder=test"]
    assert main(words) == 2
    assert "data.bit_depth 12 differs from that of the fit (10)" in one_line(capsys)
    fit = ["fit", *FIT, "--data.root=parts", "--data.bit_depth=12", "--output.folder=fit12"]
    assert main(fit) == 0
    assert "12 are used (data.bit_depth)" in one_line(capsys)
    assert main(["test", "--ckpt_path=fit12/checkpoints/last.ckpt", "--output.folder=test"]) == 0


def test_the_depth_is_that_of_all_images_in_any_layout_and_for_zero_shot(
    workplace: Path, capsys: pytest.CaptureFixture[str], tiny_clip_config: str
) -> None:
    root = workplace / "set"
    camera_images(root / "nut" / "train" / "good", 2, 12)
    camera_images(root / "nut" / "test" / "good", 2, 10, seed=1)
    camera_images(root / "nut" / "test" / "cut", 1, 12, seed=2)
    save_picture(root / "nut" / "test" / "cut" / "eight.png")
    words = ["test", "--model=SDP", f"--model.backbone.name={tiny_clip_config}"]
    words += ["--model.backbone.pretrained=random", "--model.rvs.method=mean", "--data=MVTecAD"]
    words += [f"--data.root={root}", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    assert main([*words, "--output.folder=test"]) == 0
    message = one_line(capsys)
    assert "3 images with 16 bits per channel: 12 are used (chosen by the highest value" in message
    assert "4095 in 2_0.png; --data.bit_depth 12 fixes it)" in message
    assert "bit depth" in Path("test/report.html").read_text()
    data = MVTecAD(str(root), image_size=40)
    data.reading.prepare(data.samples("test"))
    image = data.dataset("test")[0]["image"]
    assert int(image.max()) == 255


def test_check_and_preview_tell_of_bits_and_frames(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    camera_images(workplace / "good", 3, 12)
    pages = [Image.new("L", (40, 40), grey) for grey in (1, 2)]
    pages[0].save("good/pages.tif", save_all=True, append_images=pages[1:])
    words = ["--data=ImageFolder", f"--data.root={workplace}"]
    main(["check", *words])
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "3 images with 16 bits per channel: 12 are used" in shown
    text = "good/pages.tif: the file has 2 frames or pages, of which only the first is read"
    assert text in shown
    assert "only the first one" not in shown  # once is enough
    assert main(["preview", *words]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "12 are used" in shown


def test_full_range_images_are_read_as_before(tmp_path: Path) -> None:
    camera_images(tmp_path / "good", 2, 16)
    data = ImageFolder(str(tmp_path), image_size=40)
    before = data.dataset("test")[1]["image"]
    data.reading.prepare(data.samples("test"))
    assert data.reading.bits_in_use == 16
    assert torch.equal(data.dataset("test")[1]["image"], before)


@pytest.mark.parametrize(("option", "message"), [("7", "from 8 to 16, got 7"), ("x", "bit_depth")])
def test_bad_depths(capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    assert main(["fit", *FIT, "--data.root=x", f"--data.bit_depth={option}"]) == 2
    assert message in capsys.readouterr().err


def test_a_large_image_names_the_option(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(25):
        save_picture(Path(f"parts/good/{number}.png"), np.full((40, 40, 3), number * 9, np.uint8))
    fit = ["fit", *FIT, "--data.root=parts", "--output.folder=fit"]
    assert main([*fit, "--data.max_pixels=1599"]) == 2
    assert "40 x 40 are 0 million pixels, more than data.max_pixels 1599" in one_line(capsys)
    assert not Path("fit").exists()
    assert main([*fit, "--data.max_pixels=1600"]) == 0


# -- crops and distortion --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "resize", "text"),
    [
        ([(100, 100)], Resize(), None),
        ([(101, 100), (7, 7)], Resize(), None),
        ([(300, 100), (10, 10)], Resize(), "aspect ratio by up to 3.00 (300 x 100 pixels)"),
        ([(90, 90)], Resize("square_crop", 256), "the centre crop shows 77 % of each image"),
        ([(90, 45)], Resize("square_crop", 256), "and images are made square, which changes"),
        ([(90, 90), (180, 90)], Resize("shorter_crop", 256), "shows 38 to 77 % of each image"),
        ([(90, 90)], Resize("shorter_crop", 224), None),
    ],
)
def test_crops_and_distortion_are_described(
    sizes: list[tuple[int, int]], resize: Resize, text: str | None
) -> None:
    described = distortion(sizes, resize, 224)
    assert described is None if text is None else text in str(described)


def test_the_share_of_a_crop_is_that_of_its_pixels() -> None:
    """By hand: mark the part of a large image that the crop shows."""
    for resize in (Resize("square_crop", 40), Resize("shorter_crop", 40)):
        ramp = np.add.outer(np.zeros(300), np.arange(600)).astype(np.float32)
        kept = np.asarray(resize.apply(Image.fromarray(ramp), 28, Image.Resampling.BILINEAR))
        columns = (kept.max() - kept.min()) / 28 * 29 / 600
        share = columns * 28 / 40
        described = distortion([(600, 300)], resize, 28)
        assert described is not None
        assert f"shows {round(100 * share)} %" in described, (share, described)


def test_the_start_line_and_the_page_tell_of_a_crop(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in [*(f"good/{n}.png" for n in range(30)), "cut/0.png"]:
        save_picture(Path("parts", name), rng.integers(0, 256, (40, 80, 3), dtype=np.uint8))
    crop = ["--data.resize.rule=shorter_crop", "--data.resize.size=40"]
    assert main(["fit", *FIT, *crop, "--data.root=parts", "--output.folder=fit"]) == 0
    remark = "the centre crop shows 32 % of each image (data.resize shorter_crop, 40 to 32 pixels)"
    assert remark in one_line(capsys)
    assert main(["test", CHECKPOINT, "--output.folder=test"]) == 0
    assert remark in one_line(capsys)
    assert remark in Path("test/report.html").read_text()


def test_a_checkpoint_has_what_an_image_goes_through_before_it_is_scored(workplace: Path) -> None:
    camera_images(workplace / "parts" / "good", 3, 12)
    options = ["--data.root=parts", "--data.resize={rule: shorter_crop, size: 40}"]
    options += ["--data.max_pixels=5000", "--trainer.precision=bf16-true"]
    assert main(["fit", *FIT, *options, "--output.folder=fit"]) == 0
    checkpoint = torch.load("fit/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["bit_depth"] == 12
    assert checkpoint["preprocessing"] == {
        "data": "ImageFolder",
        "image_size": 32,
        "resize": {"rule": "shorter_crop", "size": 40, "filter": "bicubic"},
        "max_pixels": 5000,
        "words": {"parts": "parts"},
        "is_named": False,
        "precision": "bf16-true",
    }
