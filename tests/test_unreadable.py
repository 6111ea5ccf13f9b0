"""Images that cannot be read: scored without by predict, left out of fit and test on request."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quiet_trainer, save_picture
from PIL import Image

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.data.reading_errors import (
    PredictionImages,
    ReadingGuard,
    UnreadableError,
    reason_of,
)
from anomaly_clip.data.samples import Sample, SampleDataset
from anomaly_clip.files import write_csv
from anomaly_clip.methods import LinearProbe, WinCLIP
from anomaly_clip.recording.unreadable_images import score_table
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.run_files import read_files
from anomaly_clip.results.run_reader import read_run
from anomaly_clip.synthesis import SynthesisSettings
from anomaly_clip.testing.processes import run_command

CONFIG = Path(__file__).parent.parent / "configs" / "own_images.yaml"
PADIM = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
PADIM += ["--model.num_channels=8", "--trainer.accelerator=cpu"]


def noise(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return save_picture(path, pixels)


def cut(path: Path) -> Path:
    """Remove the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def protocol_of(run: Path, file: str = "metrics.json") -> dict[str, Any]:
    protocol: dict[str, Any] = json.loads((run / file).read_text())["run"]["protocol"]
    return protocol


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(6):
        noise(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def words(tiny_clip_config: str, photos: Path, tmp_path: Path) -> list[str]:
    return [
        "predict",
        f"--config={CONFIG}",
        f"--model.backbone.name={tiny_clip_config}",
        "--model.backbone.pretrained=random",
        "--model.stages=null",
        '--model.prompts.templates=["the {}."]',
        "--model.rvs.method=mean",
        f"--data.root={photos}",
        "--data.category=plank",
        "--data.num_workers=0",
        f"--output.folder={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
    ]


# -- predict -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--data.num_workers=2", "--data.batch_size=2"],
        ["--data.cache=true", "--data.batch_size=1", "--output.raw_maps=true"],
        ["--data.unreadable=skip", "--output.maps=false"],
    ],
    ids=["plain", "workers", "cache", "skip"],
)
def test_predict_scores_the_other_images(
    words: list[str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    last = cut(photos / "5.png")
    cut(photos / "2.png")
    assert main([*words, *more]) == 1
    err = capsys.readouterr().err
    closing = err.strip().splitlines()[-1]
    assert closing.startswith(
        "4 of 6 images scored; 2 could not be read (listed in scores.csv), such as "
        f"{photos / '2.png'}: the image cannot be decoded"
    )
    run = tmp_path / "run"
    rows = rows_of(run)
    assert [row["path"] for row in rows] == [str(photos / f"{n}.png") for n in range(6)]
    assert list(rows[0])[-2:] == ["weights", "error"]
    for number, row in enumerate(rows):
        assert (row["image_score"] == "") == (row["r0"] == "") == (number in (2, 5))
        assert row["error"].startswith("the image cannot" if number in (2, 5) else "")
        assert bool(row["error"]) == (number in (2, 5))
        assert row["category"] == "plank"
        assert row["weights"] == "random"
    assert str(last) not in rows[5]["error"]
    protocol = protocol_of(run, "predict.json")
    assert protocol["complete"] is False
    assert (protocol["listed"], protocol["unreadable_images"]) == (6, 2)
    page = (run / "report.html").read_text()
    assert "2 IMAGES COULD NOT BE READ" in page
    assert page.count("<dd>the image cannot be decoded") == 2
    assert "4 images" in page
    assert len(list((run / "gallery").rglob("*.webp"))) == 4
    maps = 0 if "--output.maps=false" in more else 4
    assert len(list(run.glob("maps/**/*.png"))) == maps
    assert main(["report", str(run), "--page"]) == 0


def test_without_unreadable_images_nothing_changes(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    assert "error" not in rows_of(tmp_path / "run")[0]
    protocol = protocol_of(tmp_path / "run", "predict.json")
    assert protocol["complete"] is True
    assert not [key for key in protocol if "unreadable" in key]
    assert "could not be read" not in (tmp_path / "run" / "report.html").read_text()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an image")


def missing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone" / "a.png")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def float_image(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(path, format="TIFF")


def too_large(path: Path) -> None:
    save_picture(path, np.zeros((100, 100, 3), dtype=np.uint8))


@pytest.mark.parametrize("damage", [empty, text, missing, loop, float_image, too_large, cut])
def test_kinds_of_damage(
    words: list[str], photos: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    damage(photos / "0.png")
    assert main([*words, "--output.page=false", "--data.max_pixels=5000"]) == 1
    rows = rows_of(tmp_path / "run")
    assert [bool(row["error"]) for row in rows] == [True, *[False] * 5]


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [folder, os.mkfifo])
def test_folders_and_pipes_are_not_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Opening a pipe would wait forever; a folder lists none of them, but a table may."""
    save_picture(tmp_path / "1.png")
    make(tmp_path / "0.png")
    sample = Sample(tmp_path / "0.png", "a", False)
    data = ImageFolder(str(tmp_path), "a", image_size=8)
    [item] = [PredictionImages(data.as_tensors([sample]))[0]]
    assert isinstance(item, UnreadableImage)
    assert item.reason.startswith("a folder or special file, not an image")
    assert reason_of(sample, data.reader()) is not None


def test_a_limit_counts_what_was_tried(
    words: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(photos / "1.png")
    limit = ["--data.batch_size=2", "--trainer.limit_predict_batches=2"]
    assert main([*words, *limit]) == 1
    assert "3 of 6 images scored; 1 could not be read" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "run")) == 4


def test_no_readable_image_at_all(
    words: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in photos.iterdir():
        cut(image)
    assert main(words) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: none of 6 images can be read, such as {photos / '0.png'}")
    assert not (tmp_path / "run").exists()
    for image in sorted(photos.iterdir())[1:]:
        image.unlink()
    assert main(words) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: {photos / '0.png'}: the image cannot be decoded")


def test_other_errors_are_still_errors(
    words: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some image cannot be read."""
    cut(photos / "5.png")

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("anomaly_clip.data.samples.resize_image", broken)
    with pytest.raises(ZeroDivisionError):
        main(words)

    def mistaken(*_: object) -> None:
        raise ValueError("not about a file")

    monkeypatch.setattr("anomaly_clip.data.samples.resize_image", mistaken)
    with pytest.raises(ValueError, match="not about a file"):
        main(words)


@pytest.mark.parametrize("broken", [(1, 3, 5), (4,)])
def test_two_processes(
    words: list[str], photos: Path, tmp_path: Path, broken: tuple[int, ...]
) -> None:
    """The second process reads images 1, 3 and 5."""
    for number in broken:
        cut(photos / f"{number}.png")
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    done = run_command([*words, *ddp, "--data.batch_size=1"], processes=2)
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"{6 - len(broken)} of 6 images scored" in done.stderr
    rows = rows_of(tmp_path / "run")
    assert [number for number, row in enumerate(rows) if row["error"]] == list(broken)
    assert (tmp_path / "run" / "report.html").is_file()


def test_images_that_disappear_are_not_drawn(
    words: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write_and_remove(*arguments: Any) -> None:
        (photos / "3.png").unlink(missing_ok=True)
        write_csv(*arguments)

    monkeypatch.setattr("anomaly_clip.recording.writer.write_csv", write_and_remove)
    assert main(words) == 1
    err = capsys.readouterr().err
    assert f"1 scored image could not be read again to be drawn: {photos / '3.png'}: there" in err
    assert len(list((tmp_path / "run" / "maps").rglob("*.png"))) == 5
    assert len(read_files(tmp_path / "run").gallery) == 5
    assert len(rows_of(tmp_path / "run")) == 6


def test_a_damaged_mask(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predict needs no masks; a test leaves out the image of a mask that it cannot read."""
    root = tmp_path / "labelled"
    for number, name in enumerate(("good/a", "good/b", "dent/a", "dent/b")):
        noise(root / f"{name}.png", number)
    for name in "ab":
        save_picture(root / "ground_truth" / "dent" / f"{name}.png", np.eye(40, 48) > 0)
    mask = cut(root / "ground_truth" / "dent" / "b.png")
    assert main([*words, f"--data.root={root}"]) == 0  # predict reads no masks
    assert len(list((tmp_path / "run" / "maps").rglob("*.png"))) == 4
    test = ["test", *words[1:-2], f"--output.folder={tmp_path / 'test'}", f"--data.root={root}"]
    capsys.readouterr()
    assert main(test) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: {mask}: the image cannot be decoded")
    assert err.endswith(", or set data.unreadable skip")
    assert main([*test, "--data.unreadable=skip"]) == 1
    errors = [row["error"] for row in rows_of(tmp_path / "test")]
    assert [bool(error) for error in errors] == [False, True, False, False]
    assert errors[1].startswith(f"{mask}: the image cannot be decoded")


def test_a_damaged_mask_of_a_normal_image(root: Path) -> None:
    """It should be empty; the image is normal, whatever the mask was."""
    mask = save_picture(root / "nut" / "ground_truth" / "good" / "0_mask.png", size=9)
    cut(mask)
    with pytest.raises(ValueError, match=r"0_mask\.png.* or set data\.unreadable skip"):
        MVTecAD(str(root), image_size=16).samples("test")
    data = MVTecAD(str(root), image_size=16, unreadable="skip")
    assert len(data.samples("test")) == 4


def test_from_python(photos: Path, tiny_clip_config: str) -> None:
    """A batch without any readable image is not scored; its key is documented in `Batch`."""
    cut(photos / "0.png")
    method = WinCLIP(CLIPSettings(tiny_clip_config, "random"))
    data = ImageFolder(str(photos), "plank", batch_size=1, num_workers=0)
    outputs: Any = quiet_trainer().predict(method, data)
    assert outputs is not None
    assert [len(scores["image_score"]) for scores in outputs] == [0, 1, 1, 1, 1, 1]
    batches: list[Any] = list(data.predict_dataloader())
    [image] = batches[0]["unreadable"]
    assert (image.index, image.path, image.category) == (0, str(photos / "0.png"), "plank")
    assert batches[0]["image"].shape == (0, *batches[1]["image"].shape[1:])
    assert {*batches[0]} == {*batches[1], "unreadable"}
    for key in ("image", "label", "index"):
        assert batches[0][key].dtype == batches[1][key].dtype


def test_the_probe_scores_no_empty_batch() -> None:
    probe = LinearProbe.__new__(LinearProbe)
    torch.nn.Module.__init__(probe)
    probe.target_names, probe.targets = ["a", "b"], "single"
    batch: Any = {"path": [], "unreadable": [UnreadableImage(0, "a.png", "a", "damaged")]}
    outputs = probe.predict_step(batch, 0)
    assert outputs.shape == (0, 2)
    assert probe.image_rows(outputs, batch) == []


def test_rows_are_in_the_order_of_the_listing() -> None:
    rows = {number: {"path": f"{number}", "category": "a", "score": number} for number in (0, 1, 3)}
    bad = [UnreadableImage(n, f"bad {n}", "a", "why") for n in (2, 4)]
    header, table = score_table(rows, bad, True, "w")
    assert header == ["path", "category", "score", "weights", "error"]
    assert [row[0] for row in table] == ["0", "1", "bad 2", "3", "bad 4"]
    assert table[2] == ["bad 2", "a", None, "w", "why"]
    bad = [UnreadableImage(n, f"bad {n}", "a", "why") for n in (0, 1, 3)]
    _, table = score_table(rows, bad, False, "w")  # the rows are 2, 4 and 6 of the listing
    assert [row[0] for row in table] == ["bad 0", "bad 1", "0", "bad 3", "1", "3"]
    assert score_table(rows, [], True, "w")[0] == ["path", "category", "score", "weights"]


# -- fit and test ------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six training images; two normal and two defective test images with masks."""
    root = tmp_path / "mvtec"
    names = [f"train/good/{n}" for n in range(6)] + ["test/good/0", "test/good/1"]
    names += ["test/cut/0", "test/cut/1"]
    for seed, name in enumerate(names):
        noise(root / "nut" / f"{name}.png", seed)
    for name in "01":
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[5:20, 5:20] = 255
        save_picture(root / "nut" / "ground_truth" / "cut" / f"{name}_mask.png", mask)
    return root


def padim(verb: str, root: Path, tmp_path: Path, *more: str) -> list[str]:
    words = [verb, *PADIM, "--data=MVTecAD", f"--data.root={root}", "--data.num_workers=0"]
    return [*words, f"--output.folder={tmp_path / verb}", *more]


def test_an_error_names_file_and_option_before_the_fit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = cut(root / "nut" / "train" / "good" / "4.png")
    assert main(padim("fit", root, tmp_path)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith(f"anomaly_clip: {image}: the image cannot be decoded")
    assert err[-1].endswith("; replace or remove the file, or set data.unreadable skip")
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_test_names_file_and_option(
    words: list[str],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    image = cut(root / "nut" / "test" / "good" / "1.png")
    words = ["test", *words[1:], "--data=MVTecAD", f"--data.root={root}"]
    words = [word for word in words if "data.category" not in word]
    assert main([*words, f"--data.num_workers={workers}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: {image}: the image cannot be decoded")
    assert err.endswith(", or set data.unreadable skip")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fit_and_test_leave_images_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = cut(root / "nut" / "train" / "good" / "4.png")
    skip = "--data.unreadable=skip"
    assert main(padim("fit", root, tmp_path, skip)) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "5 images (0 anomalous) in 1 category, without 1 unreadable image;" in err
    message = "fitted without 1 image that could not be read (data.unreadable skip): "
    assert f"{message}{train}: the image cannot" in err
    checkpoint = f"--ckpt_path={tmp_path / 'fit' / 'checkpoints' / 'last.ckpt'}"
    assert main(padim("test", root, tmp_path, checkpoint)) == 0  # its own images can be read
    protocol = protocol_of(tmp_path / "test")
    assert protocol["fitted_without"] == 1
    assert protocol["complete"] is True
    assert "unreadable" not in protocol
    assert "unreadable_images" not in protocol
    assert "FITTED WITHOUT 1 IMAGE THAT COULD NOT BE READ" in capsys.readouterr().out
    for place in ("good/0", "cut/0"):
        cut(root / "nut" / "test" / f"{place}.png")
    second = f"--output.folder={tmp_path / 'second'}"
    assert main(padim("test", root, tmp_path, checkpoint, skip, second)) == 1
    out, err = capsys.readouterr()
    assert "PARTIAL: 2 of 4 images" in out
    assert "2 IMAGES COULD NOT BE READ" in out
    assert "2 of 4 images scored; 2 could not be read" in err.splitlines()[-1]
    protocol = protocol_of(tmp_path / "second")
    assert (protocol["unreadable"], protocol["unreadable_images"]) == ("skip", 2)
    assert (protocol["complete"], protocol["listed"]) == (False, 4)
    assert protocol["images"] == {"nut": 2}
    rows = rows_of(tmp_path / "second")
    assert [(Path(row["path"]).parent.name, bool(row["error"])) for row in rows] == [
        ("cut", True),
        ("cut", False),
        ("good", True),
        ("good", False),
    ]
    run: FinishedRun = read_run(tmp_path / "second")
    assert [tag.short for tag in run.tags if tag.short != "random"] == [
        "partial",
        "unreadable",
        "unreadable",
    ]
    page = (tmp_path / "second" / "report.html").read_text()
    assert "2 IMAGES COULD NOT BE READ" in page
    assert "PARTIAL: 2 of 4 images were scored" in page
    assert page.count("<dd>the image cannot be decoded") == 2


@pytest.mark.slow
def test_skip_without_unreadable_images_is_a_success(root: Path, tmp_path: Path) -> None:
    skip = "--data.unreadable=skip"
    assert main(padim("fit", root, tmp_path, skip)) == 0
    checkpoint = f"--ckpt_path={tmp_path / 'fit' / 'checkpoints' / 'last.ckpt'}"
    assert main(padim("test", root, tmp_path, checkpoint, skip)) == 0
    protocol = protocol_of(tmp_path / "test")
    assert protocol["unreadable"] == "skip"
    assert not {"unreadable_images", "fitted_without"} & {*protocol}
    assert "error" not in rows_of(tmp_path / "test")[0]


def test_a_category_without_readable_images_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (root / "nut" / "train" / "good").iterdir():
        cut(image)
    assert main(padim("fit", root, tmp_path, "--data.unreadable=skip")) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "category 'nut' has no train images that can be read, such as" in err
    assert not (tmp_path / "fit").exists()


@pytest.mark.slow
def test_each_counts_what_was_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(root / "nut" / "train" / "good" / "4.png")
    for name in ("train/good/0", "train/good/1", "test/good/0", "test/good/1"):
        noise(root / "cap" / f"{name}.png", 70 + len(name) + int(name[-1]))
    cut(root / "cap" / "test" / "good" / "1.png")
    assert main(padim("each", root, tmp_path, "--data.unreadable=skip")) == 1
    protocol = protocol_of(tmp_path / "each")
    assert (protocol["unreadable_images"], protocol["fitted_without"]) == (1, 1)
    assert (protocol["listed"], protocol["complete"]) == (6, False)
    out = capsys.readouterr().out
    assert "1 IMAGE COULD NOT BE READ" in out
    assert "FITTED WITHOUT 1 IMAGE" in out
    assert main(["each", f"--resume={tmp_path / 'each'}"]) == 1
    assert "1 IMAGE COULD NOT BE READ" in (tmp_path / "each" / "report.html").read_text()


def test_an_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same images are held out, except those that cannot be read."""
    root = tmp_path / "product"
    for number in range(20):
        noise(root / "good" / f"{number:02}.png", 100 + number)
    for number in range(3):
        noise(root / "cut" / f"{number}.png", 200 + number)
    before = ImageFolder(str(root), test_share=0.5).held_out
    broken = {cut(root / "good" / f"0{number}.png") for number in range(5)}
    words = [*PADIM, "--data=ImageFolder", f"--data.root={root}", "--data.test_share=0.5"]
    words += ["--data.num_workers=0", f"--output.folder={tmp_path / 'fit'}"]
    assert main(["fit", *words]) == 2
    assert ", or set data.unreadable skip" in capsys.readouterr().err
    after = ImageFolder(str(root), test_share=0.5, unreadable="skip").held_out
    assert after == before - broken
    assert main(["fit", *words, "--data.unreadable=skip"]) == 1
    checkpoint = f"--ckpt_path={tmp_path / 'fit' / 'checkpoints' / 'last.ckpt'}"
    main(["test", checkpoint, f"--output.folder={tmp_path / 'test'}"])
    protocol = protocol_of(tmp_path / "test")
    assert protocol["overlap"] == 0
    assert protocol["images"] == {"product": 3 + len(after)}


def test_references_that_cannot_be_read_are_replaced(
    root: Path, tmp_path: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model=WinCLIP", f"--model.backbone.name={tiny_clip_config}"]
    words += ["--model.backbone.pretrained=random", "--data=MVTecAD", f"--data.root={root}"]
    words += ["--data.shots=2", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    drawn = MVTecAD(str(root), shots=2).shots_of("nut")
    image = cut(drawn[0].image)
    assert main(["test", *words, f"--output.folder={tmp_path / 'test'}"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"anomaly_clip: {image}: the image cannot be decoded")
    assert err.endswith(", or set data.unreadable skip")
    for verb in ("test", "predict"):
        run = tmp_path / verb
        skip = ["--data.unreadable=skip", f"--output.folder={run}"]
        assert main([verb, *words, *skip]) == 1
        err = capsys.readouterr().err.strip().splitlines()[-1]
        message = "1 reference image could not be read, and others were used"
        assert err.startswith(f"{message}: {image}: the image cannot be decoded")
        used = json.loads((run / "references.json").read_text())["nut"]
        assert str(image) not in used
        assert str(drawn[1].image) in used
        assert len(used) == 2
        file = "metrics.json" if verb == "test" else "predict.json"
        protocol = protocol_of(run, file)
        assert (protocol["unreadable_references"], protocol["complete"]) == (1, True)


@pytest.mark.slow
def test_validation_images_are_left_out_and_a_fit_resumes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(root / "nut" / "train" / "good" / "3.png")
    image = cut(root / "nut" / "test" / "good" / "0.png")
    more = ["--model=RD4AD", "--data.val_split=test", "--data.unreadable=skip"]
    words = [word for word in padim("fit", root, tmp_path) if not word.startswith("--model")]
    words += [*more, "--model.backbone.weights=random", "--model.image_size=64"]
    words += ["--trainer.log_every_n_steps=1"]
    assert main([*words, "--trainer.max_epochs=1"]) == 1
    assert ", without 2 unreadable images;" in " ".join(capsys.readouterr().err.split())
    checkpoint = f"--ckpt_path={tmp_path / 'fit' / 'checkpoints' / 'last.ckpt'}"
    again = f"--output.folder={tmp_path / 'again'}"
    assert main([*words, "--trainer.max_epochs=2", checkpoint, again]) == 1
    state = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["fitted_without"]) == (2, 2)
    words[0] = "validate"
    assert main([*words, checkpoint, f"--output.folder={tmp_path / 'validate'}"]) == 1
    image.unlink()
    noise(image, 6)
    assert main([*words, checkpoint, f"--output.folder={tmp_path / 'other'}"]) == 0


def test_an_auxiliary_set_follows_the_option(root: Path, tmp_path: Path) -> None:
    cut(root / "nut" / "test" / "cut" / "1.png")
    options: tuple[tuple[Any, int], ...] = (("error", 4), ("skip", 3))
    for option, number in options:
        auxiliary = MVTecAD(str(root))
        data = MVTecAD(str(root), auxiliary=auxiliary, image_size=16, unreadable=option)
        assert len(data.fit_samples()) == number
        assert len(data.unreadable.of_fit()) == 4 - number
    data = MVTecAD(str(root), auxiliary=MVTecAD(str(root), unreadable="skip"), image_size=16)
    assert data.summary("fit").count("without 1 unreadable image") == 1


# -- the listing -------------------------------------------------------------------------------


def names(samples: list[Sample]) -> list[str]:
    return [sample.image.stem for sample in samples]


def test_draws_of_few_images_replace_only_what_cannot_be_read(root: Path) -> None:
    def drawn(unreadable: Any = "error", shots: int | None = None, **more: Any) -> list[str]:
        data = MVTecAD(str(root), shots=shots, unreadable=unreadable, image_size=16, **more)
        return names(data.shots_of("nut"))

    few, more = drawn(shots=3), drawn(shots=4)
    [next_one] = set(more) - set(few)
    cut(root / "nut" / "train" / "good" / f"{few[1]}.png")
    assert set(drawn("skip", 3)) == {few[0], few[2], next_one}
    assert set(drawn("skip", 2)) < set(drawn("skip", 3)) < set(drawn("skip", 5))
    assert drawn(shots=3) == few  # an error when they are read
    with pytest.raises(ValueError, match="has 5 normal training images that can be read: lower"):
        drawn("skip", 6)
    assert len(drawn("skip", fraction=1.0)) == 5
    data = MVTecAD(str(root), unreadable="skip", image_size=16)
    assert set(names(data.drawn_of("nut", 5, 0))) == set("012345") - {few[1]}
    with pytest.raises(ValueError, match=r"model\.shots 6: category 'nut' has 5 normal training"):
        data.drawn_of("nut", 6, 0)
    assert len(data.references("nut", 5)["path"]) == 5


@pytest.mark.parametrize("kind", ["synthetic", "auxiliary"])
def test_validation_images_stay_the_same(root: Path, kind: Any) -> None:
    def parts(unreadable: Any) -> list[set[Path]]:
        options: dict[str, Any] = {"val_split": kind, "val_share": 0.5, "unreadable": unreadable}
        if kind == "synthetic":
            data = MVTecAD(str(root), synthesis=SynthesisSettings("cutpaste"), **options)
            both = data.validation.normal_parts
        else:
            data = MVTecAD(str(root), auxiliary=MVTecAD(str(root)), **options)
            both = data.validation.auxiliary_parts
        assert data.fit_samples() == both[0]
        return [{sample.image for sample in part} for part in both]

    before = parts("error")
    broken = {sorted(part)[0] for part in before}
    for image in broken:
        cut(image)
    assert parts("error") == before
    assert parts("skip") == [part - broken for part in before]


def test_predict_lists_what_a_test_leaves_out(root: Path) -> None:
    cut(root / "nut" / "test" / "good" / "0.png")
    data = MVTecAD(str(root), image_size=16, unreadable="skip")
    counts = []
    for stage in ("test", "predict", "test"):
        data.setup(stage)
        counts.append(len(data.samples("test")))
    assert counts == [3, 4, 3]
    assert "in 1 category, without 1 unreadable image;" in data.summary("test")


def test_errors_that_are_not_about_decoding_remain(root: Path) -> None:
    """A mask of another size is a mistake in the data set, which skip does not hide."""
    save_picture(root / "nut" / "ground_truth" / "cut" / "0_mask.png", size=17)
    data = MVTecAD(str(root), image_size=16, unreadable="skip")
    assert len(data.samples("test")) == 4
    with pytest.raises(ValueError, match="make the sizes equal"):
        data.dataset("test")[0]
    (root / "nut" / "ground_truth" / "cut" / "0_mask.png").unlink()
    data.listing.forget()
    with pytest.raises(FileNotFoundError, match="its mask is missing"):
        data.samples("test")


def test_the_guard_names_the_file_once(root: Path) -> None:
    data = MVTecAD(str(root), image_size=16)
    dataset: SampleDataset = data.dataset("test")
    image = cut(dataset.samples[0].image)
    with pytest.raises(UnreadableError, match=r"or set data\.unreadable skip") as caught:
        dataset[0]
    assert str(caught.value).count(str(image)) == 1
    assert caught.value.reason.endswith("replace or remove the file")
    guard = ReadingGuard(data.reader())
    with pytest.raises(KeyError), guard(dataset.samples[0]):
        raise KeyError
    with pytest.raises(ValueError, match="another"), guard(dataset.samples[1]):
        raise ValueError("another")


# -- preview -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--split=train", "--data.unreadable=skip"],
        ["--data.synthesis.recipe=cutpaste"],
        ['--data.augment=[{"class_path": "HorizontalFlip"}]'],
    ],
)
def test_preview_draws_the_others(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    for name in ("train/good/1", "test/cut/1"):
        cut(root / "nut" / f"{name}.png")
    sheet = tmp_path / "sheet.png"
    words = ["preview", "--data=MVTecAD", f"--data.root={root}", f"--file={sheet}"]
    assert main([*words, *more]) == 1
    out, err = capsys.readouterr()
    assert out.strip() == str(sheet)
    assert "could not be read" in err
    assert "1.png: the image cannot be decoded" in err
    assert sheet.is_file()


def test_preview_of_nothing_readable(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (root / "nut" / "test").rglob("*.png"):
        cut(image)
    sheet = tmp_path / "sheet.png"
    assert main(["preview", "--data=MVTecAD", f"--data.root={root}", f"--file={sheet}"]) == 2
    assert "the image cannot be decoded" in capsys.readouterr().err
    assert not sheet.exists()
