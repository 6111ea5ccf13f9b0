from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.dataset import Sample
from anomaly_clip.data.folder import held_out


def listing(root: Path) -> list[Sample]:
    return ImageFolder(str(root), "laser-cut plank", image_size=16).samples("test")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(50, 80, 3), (90, 30, 3), (40, 40, 3)]):
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        save_picture(tmp_path / "photos" / f"photo {number}.png", picture)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    root = tmp_path / "labelled"
    for name in ("good/a", "good/b", "cut/a", "burnt/a", "burnt/b"):
        save_picture(root / f"{name}.png")
    return root


def add_masks(root: Path) -> None:
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:20] = 255
    for name in ("cut/a_mask", "burnt/a", "burnt/b_mask"):
        save_picture(root / "ground_truth" / f"{name}.png", mask)


def test_a_plain_folder_has_no_labels(flat: Path) -> None:
    save_picture(flat / "more" / "deep" / "x.jpg")
    (flat / "loop").symlink_to(flat)
    data = ImageFolder(str(flat), "laser-cut plank", image_size=16)
    assert not data.has_labels
    assert not data.has_masks
    samples = data.samples("test")
    assert [s.image.name for s in samples] == ["x.jpg", "photo 0.png", "photo 1.png", "photo 2.png"]
    assert [s.defect for s in samples] == ["more/deep", "", "", ""]
    assert {s.category for s in samples} == {"laser-cut plank"}
    assert "mask" not in data.dataset("test")[0]


def test_folders_are_kinds_of_defects(labelled: Path) -> None:
    samples = listing(labelled)
    assert [(s.defect, s.label) for s in samples] == [
        ("burnt", True),
        ("burnt", True),
        ("cut", True),
        ("good", False),
        ("good", False),
    ]
    assert not any(s.mask for s in samples)


def test_masks_are_paired_by_name(labelled: Path) -> None:
    add_masks(labelled)
    data = ImageFolder(str(labelled), "laser-cut plank", image_size=16)
    assert data.has_masks
    masks = [s.mask and s.mask.name for s in data.samples("test")]
    assert masks == ["a.png", "b_mask.png", "a_mask.png", None, None]
    dataset = data.dataset("test")
    assert [bool(dataset[i]["mask"].any()) for i in range(5)] == [True, True, True, False, False]


def test_unmatched_masks_and_images(labelled: Path) -> None:
    add_masks(labelled)
    spare = save_picture(labelled / "ground_truth" / "cut" / "z_mask.png")
    with pytest.raises(ValueError, match=r"z_mask\.png: a mask without an image"):
        listing(labelled)
    spare.unlink()
    (labelled / "ground_truth" / "burnt" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"burnt/a\.png: its mask is missing"):
        listing(labelled)


def test_invalid_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; expected images"):
        listing(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found nothing"):
        listing(tmp_path / "empty")
    with pytest.raises(ValueError, match="' ' is empty: name the object in the images"):
        ImageFolder(str(tmp_path), " ")


@pytest.fixture
def command(tiny_clip_config: str, tmp_path: Path) -> Callable[..., list[str]]:
    config = tmp_path / "folder.yaml"
    config.write_text(
        f"""
model:
  class_path: SDP
  init_args:
    backbone: {{name: {tiny_clip_config}, pretrained: random}}
    rvs: {{method: mean}}
data:
  class_path: ImageFolder
  init_args: {{num_workers: 0}}
trainer: {{accelerator: cpu}}
output: {{root: {tmp_path / "runs"}}}
"""
    )

    def words(verb: str, root: Path, *more: str) -> list[str]:
        named = ["--data.category", "laser-cut plank", "--data.root", str(root)]
        return [verb, "--config", str(config), *named, *more]

    return words


def test_predict_on_a_plain_folder(
    command: Callable[..., list[str]], flat: Path, tmp_path: Path
) -> None:
    assert main(command("predict", flat, "--output.raw_maps=true")) == 0
    run = tmp_path / "runs" / "folder" / "1-predict"
    lines = (run / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,category,label,image_score,r0,r1,weights"
    assert lines[1].startswith(f"{flat / 'photo 0.png'},laser-cut plank,,0.")
    for number, (height, width) in enumerate([(50, 80), (90, 30), (40, 40)]):
        raw = np.load(run / "raw_maps" / "laser-cut plank" / f"photo {number}.npy")
        assert raw.dtype == np.float16
        assert raw.shape == (32, 32)
        enlarged = max(1.0, 240 / max(height, width))
        with Image.open(run / "maps" / "laser-cut plank" / f"photo {number}.png") as sheet:
            assert sheet.width == 2 * round(width * enlarged) + 4  # at the image's aspect ratio


def test_test_needs_labels(
    command: Callable[..., list[str]],
    flat: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command("test", flat)) == 2
    assert "has no labels to compute metrics with" in capsys.readouterr().err
    assert main(command("test", labelled)) == 0
    assert "–" in capsys.readouterr().out  # no masks: pixel metrics are missing
    add_masks(labelled)
    assert main(command("test", labelled)) == 0
    assert "–" not in capsys.readouterr().out


# -- fits on a user's folder ---------------------------------------------------------------------


def noise_images(folder: Path, count: int, seed: int = 0) -> None:
    """Write so many different images."""
    rng = np.random.default_rng([seed, count, len(str(folder))])
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        save_picture(folder / f"{number:03d}.png", pixels)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """Return a folder with 40 normal and 4 defective images."""
    noise_images(tmp_path / "product" / "good", 40)
    noise_images(tmp_path / "product" / "cut", 4)
    return tmp_path / "product"


def test_membership_depends_on_seed_and_content_alone(product: Path) -> None:
    def chosen(share: float, seed: int, group: str | None = None) -> set[str]:
        samples = ImageFolder(str(product), seed=seed).form.labelled
        return {path.name for path in held_out(samples, share, seed, group) if "good" in str(path)}

    first = chosen(0.2, 0)
    assert 2 <= len(first) <= 16
    assert chosen(0.2, 0) == first
    assert chosen(0.2, 1) != first
    assert first <= chosen(0.5, 0)  # a larger share holds out more, and the same
    assert chosen(0.0, 0) == set()
    noise_images(product / "more", 10, seed=5)
    for number, image in enumerate(sorted((product / "more").iterdir())):
        image.rename(product / "good" / f"a{number}.png")
    assert {name for name in chosen(0.2, 0) if not name.startswith("a")} == first
    tens = chosen(0.5, 0, r"\d(\d)\d")  # files of the same tens stay together
    assert 0 < len(tens) < 50
    for ten in range(4):
        members = {f"0{ten}{unit}.png" for unit in range(10)}
        assert len(members & tens) in (0, 10)


def test_a_fit_splits_the_normal_images(product: Path) -> None:
    data = ImageFolder(str(product), image_size=32)
    assert data.category == "product"
    assert data.splits == ("test",)  # nothing is fitted yet
    assert len(data.samples("test")) == 44
    data.setup("fit")
    train, test = data.samples("train"), data.samples("test")
    assert not {s.image for s in train} & {s.image for s in test}
    assert len(train) + len(test) == 44
    assert sum(sample.label for sample in test) == 4
    assert {s.image for s in test if not s.label} == data.held_out
    assert f"{len(data.held_out)} normal images are held out for the test" in data.summary("fit")
    assert data.protocol()["test_share"] == 0.2


def test_without_defects_all_normal_images_are_trained_on(product: Path, tmp_path: Path) -> None:
    for image in (product / "cut").iterdir():
        image.unlink()
    (product / "cut").rmdir()
    data = ImageFolder(str(product), image_size=32)
    data.setup("fit")
    assert data.splits == ("train",)
    assert len(data.fit_samples()) == 40
    flat = ImageFolder(str(product / "good"), image_size=32)
    with pytest.raises(ValueError, match=r"nothing tells which images are normal: put them into"):
        flat.setup("fit")
    flat = ImageFolder(str(product / "good"), image_size=32, normal="all")
    flat.setup("fit")
    assert len(flat.fit_samples()) == 40
    assert "all are normal (data.normal all)" in flat.summary("fit")


FIT = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
FIT += ["--data=ImageFolder", "--data.num_workers=0", "--trainer.accelerator=cpu"]


def test_fit_test_and_predict_on_a_folder(
    product: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The test leaves out what was fitted on; predict scores any other folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *FIT, f"--data.root={product}", "--output.folder=fit"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "good/ (40) is normal, cut/ (4) defective, there are no masks" in err
    checkpoint = "--ckpt_path=fit/checkpoints/last.ckpt"
    assert main(["test", checkpoint, "--output.folder=test"]) == 0
    protocol = json.loads(Path("test/metrics.json").read_text())["run"]["protocol"]
    assert protocol["overlap"] == 0
    assert protocol["anomalous"] == {"product": 4}
    assert 5 < protocol["images"]["product"] < 24
    noise_images(tmp_path / "new", 3, seed=9)
    assert main(["predict", checkpoint, "--data.root=new", "--output.folder=new_scores"]) == 0
    assert len(Path("new_scores/scores.csv").read_text().splitlines()) == 4
    assert main(["predict", checkpoint, "--output.folder=same"]) == 0  # also those of the fit
    assert len(Path("same/scores.csv").read_text().splitlines()) == 45


def test_images_of_the_fit_are_refused_in_a_test(
    product: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where they are saved again, in another format and folder."""
    monkeypatch.chdir(tmp_path)
    options = ["--data.test_share=0", "--output.folder=fit"]
    assert main(["fit", *FIT, f"--data.root={product}", *options]) == 0
    copies = tmp_path / "copies"
    for image in sorted((product / "good").iterdir())[:5]:
        with Image.open(image) as opened:
            (copies / "good").mkdir(parents=True, exist_ok=True)
            opened.save(copies / "good" / f"copy of {image.stem}.bmp")
    noise_images(copies / "good", 3, seed=4)
    noise_images(copies / "cut", 3, seed=5)
    capsys.readouterr()
    words = ["test", "--ckpt_path=fit/checkpoints/last.ckpt", f"--data.root={copies}"]
    assert main(words) == 2
    message = "5 of 11 test images were fitted on, such as"
    assert message in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--data.allow_overlap=true", "--output.folder=test"]) == 0
    assert "5 TEST IMAGES ARE AMONG THE TRAINING IMAGES" in capsys.readouterr().out
    assert json.loads(Path("test/metrics.json").read_text())["run"]["protocol"]["overlap"] == 5
    assert "5 TEST IMAGES ARE AMONG" in Path("test/report.html").read_text()


def test_methods_with_prompts_need_the_name_of_the_object(
    command: Callable[..., list[str]], flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in command("predict", flat) if w not in ("--data.category", "laser-cut plank")]
    assert main(words) == 2
    assert "prompts contain the name of the object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 1.0}, r"data.test_share must be in \[0, 1\), got 1"),
        ({"group": "("}, "data.group '\\(' is not a regular expression"),
        ({"normal": "some"}, "data.normal must be one of folders, all, got some"),
    ],
)
def test_bad_options(product: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(product), **options)


def test_empty_masks_of_normal_images(labelled: Path) -> None:
    add_masks(labelled)
    place = labelled / "ground_truth" / "good"
    save_picture(place / "a_mask.png", np.zeros((40, 40), dtype=np.uint8))
    assert len(listing(labelled)) == 5
    save_picture(place / "a_mask.png", np.full((40, 40), 255, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a_mask\.png: the mask of a normal image is not empty"):
        listing(labelled)


@pytest.mark.slow
def test_each_and_preview_on_a_folder(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["each", *FIT, f"--data.root={product}", "--output.folder=each"]) == 0
    assert Path("each/metrics.json").is_file()
    flip = '[{"class_path": "HorizontalFlip"}]'
    data = ["--data=ImageFolder", f"--data.root={product}", f"--data.augment={flip}"]
    assert main(["preview", *data, "--file=sheet.png"]) == 0


def test_predict_with_references_scores_every_image(
    product: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    words = ["--model=WinCLIP", f"--model.backbone.name={tiny_clip_config}"]
    words += ["--model.backbone.pretrained=random", "--data=ImageFolder", "--data.shots=2"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--data.category=plank"]
    run = tmp_path / "run"
    assert main(["predict", *words, f"--data.root={product}", f"--output.folder={run}"]) == 0
    assert len((run / "scores.csv").read_text().splitlines()) == 45


def test_a_group_must_match(product: Path) -> None:
    for stage in ("fit", "test"):
        data = ImageFolder(str(product), image_size=32, group="part_")
        with pytest.raises(ValueError, match=r"'part_' matches none of the 40 file names, such as"):
            data.setup(stage) if stage == "fit" else data.held_out
    data = ImageFolder(str(product), image_size=32, group=r"^00(\d)", test_share=0.5)
    data.setup("fit")
    assert "data.group matches 10 of 40 normal images, in 10 groups" in data.summary("fit")
    alone = ImageFolder(str(product / "good"), image_size=32, group="x", normal="all")
    alone.setup("fit")
    assert "data.group is not used" in alone.summary("fit")


def test_normal_all_is_ignored_with_labels(product: Path) -> None:
    data = ImageFolder(str(product), image_size=32, normal="all")
    data.setup("fit")
    assert "data.normal all is ignored" in data.summary("fit")
    assert len(data.fit_samples()) < 40


def test_training_folders_without_a_normal_one_are_refused(
    product: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = product.parent / "kinds"
    for name in ("train/a", "train/b", "test/good", "test/cut"):
        noise_images(root / name, 3)
    fit = ["fit", *FIT, f"--data.root={root}", f"--output.folder={root.parent / 'run'}"]
    for place in ("test/good", "good"):
        assert main(fit) == 2
        message = f"{root}: train/ has no normal folder (good, ok, normal), only a, b: put the"
        assert message in capsys.readouterr().err
        assert not (root.parent / "run").exists()
        (root / place).rename(root / "good")
    data = ImageFolder(str(root), image_size=32, normal_folders=["a", "b", "good"])
    data.setup("fit")
    assert len(data.fit_samples()) == 6


@pytest.mark.slow
def test_without_defects_each_fits_and_test_refuses(
    product: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for image in (product / "cut").iterdir():
        image.unlink()
    assert main(["each", *FIT, f"--data.root={product}", "--output.folder=each"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "no folder is defective, so there is nothing to test on; fitted: each" in error
    assert Path("each/product/checkpoints/last.ckpt").is_file()
    assert not Path("each/metrics.json").exists()
    assert main(["each", "--resume=each"]) == 0
    checkpoint = "--ckpt_path=each/product"
    capsys.readouterr()
    assert main(["test", checkpoint, "--output.folder=test"]) == 2
    error = capsys.readouterr().err
    assert "all 40 images are normal and were fitted on, so there is nothing to test on" in error
    assert not Path("test").exists()
    assert main(["predict", checkpoint, "--output.folder=scores"]) == 0
