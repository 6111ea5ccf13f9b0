"""Tests of ``anomaly_clip calibrate`` and ``fit --calibrate true``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regad_runs
import torch
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.data.file_hashes import pixel_hashes
from anomaly_clip.decisions.calibration import Calibration
from anomaly_clip.recording.calibration_files import calibration_file, is_version_of
from anomaly_clip.recording.run_conditions import file_sha256

PATCHCORE = [
    *("--model", "PatchCore", "--model.backbone.name", "squeezenet1_1"),
    *("--model.backbone.weights", "random", "--model.layers", "[features.3]"),
    *("--model.image_size", "32", "--model.coreset", "0.5", "--trainer.accelerator", "cpu"),
]
SDP = [
    *("--model", "SDP", "--model.backbone.pretrained", "demo", "--trainer.accelerator", "cpu"),
    *("--data", "ImageFolder", "--data.num_workers", "0"),
]


def photographs(folder: Path, count: int, start: int = 0, kind: str = "good") -> Path:
    """Write images of noise on a ramp, with a white square unless they are good."""
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        image = np.tile(np.arange(40, dtype=np.uint8)[:, None, None] * 3, (1, 40, 3))
        image = image + rng.integers(0, 60, image.shape, dtype=np.uint8)
        if kind != "good":
            image[10:22, 12:24] = 255
        save_picture(folder / kind / f"{number:03d}.png", image)
    return folder


def own_images(root: Path, runs: Path, *more: str) -> list[str]:
    return [
        *PATCHCORE,
        *("--data", "ImageFolder", "--data.root", str(root), "--data.num_workers", "0"),
        *("--output.root", str(runs), "--output.name", "run", *more),
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``photos`` (30 normal images, 4 defects) and a calibrated run."""
    folder = tmp_path_factory.mktemp("calibrated")
    photographs(folder / "photos", 30)
    assert (
        main(["fit", *own_images(folder / "photos", folder / "runs", "--calibrate", "true")]) == 0
    )
    return folder


def checkpoint(folder: Path) -> Path:
    return folder / "runs" / "run" / "1-fit" / "checkpoints" / "last.ckpt"


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint(folder), weights_only=True)
    return content


def test_fit_holds_images_out_and_calibrates_on_them(fitted: Path) -> None:
    content = content_of(fitted)
    record = content["calibration"]["categories"]["photos"]
    photos = pixel_hashes((fitted / "photos" / "good").iterdir())
    assert record["n"] == len(record["scores"]) == 15
    assert {*record["images"]} | {*content["fitted_images"]} == {*photos.values()}
    assert not {*record["images"]} & {*content["fitted_images"]}
    beside = json.loads((checkpoint(fitted).parent / "calibration.json").read_text())
    assert beside == content["calibration"]
    calibration = Calibration.from_dict(beside, "here")
    level = calibration.categories["photos"].level(0.05)
    assert not level.is_as_asked  # 15 images allow 6.25 % at best
    assert level.threshold == record["scores"][-1]
    assert calibration.conditions["image_size"] == 32


def test_scores_are_those_of_predict(fitted: Path, tmp_path: Path) -> None:
    command = ["--ckpt_path", str(checkpoint(fitted)), "--output.page", "false"]
    command += ["--output.folder", str(tmp_path / "scores"), "--output.maps", "false"]
    assert main(["predict", *command, "--data.root", str(fitted / "photos")]) == 0
    lines = (tmp_path / "scores" / "scores.csv").read_text().splitlines()
    column = lines[0].split(",").index("image_score")
    by_path = {Path(line.split(",")[0]): float(line.split(",")[column]) for line in lines[1:]}
    record = content_of(fitted)["calibration"]["categories"]["photos"]
    images = pixel_hashes(by_path)
    scores = sorted(by_path[path] for path, key in images.items() if key in record["images"])
    assert scores == pytest.approx(record["scores"], rel=1e-6)


def test_calibrating_again_needs_no_fit(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    file = checkpoint(tmp_path)
    before, state = file_sha256(file), content_of(tmp_path)
    assert main(["calibrate", "--ckpt_path", str(file.parent.parent)]) == 0
    again = content_of(tmp_path)
    assert again["calibration"]["categories"] == state["calibration"]["categories"]
    printed = capsys.readouterr().err
    (path,) = re.findall(r"photos: the threshold is the highest score, that of (\S+):", printed)
    assert Path(path).is_file()
    assert "15 of 30 normal images were fitted on, and are not calibrated on" in printed
    photographs(tmp_path / "more", 40, start=200)
    options = ["--data.root", str(tmp_path / "more"), "--calibration.alpha", "[0.1, 0.05]"]
    assert main(["calibrate", "--ckpt_path", str(file), *options]) == 0
    last = content_of(tmp_path)
    assert [*last["calibration"]["categories"]] == ["photos"]  # the name of the fit
    assert last["calibration"]["alpha"] == [0.1, 0.05]
    assert last["calibration"]["categories"]["photos"]["n"] == 40
    for name, value in state["state_dict"].items():
        assert torch.equal(last["state_dict"][name], value)
    assert before is not None
    assert is_version_of(file, before)
    assert not is_version_of(file, "0" * 64)


def test_images_of_the_fit_are_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    used = content_of(tmp_path)["fitted_images"]
    (tmp_path / "photos" / "good").mkdir(parents=True)
    for path, key in pixel_hashes((fitted / "photos" / "good").iterdir()).items():
        if key in used:
            shutil.copy(path, tmp_path / "photos" / "good" / f"copy-{path.name}")
    before = checkpoint(tmp_path).read_bytes()
    command = ["calibrate", "--ckpt_path", str(checkpoint(tmp_path))]
    assert main([*command, "--data.root", str(tmp_path / "photos")]) == 2
    assert "all 15 normal images of 'photos'" in capsys.readouterr().err
    assert checkpoint(tmp_path).read_bytes() == before


def test_a_test_on_calibration_images_is_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = content_of(fitted)["calibration"]["categories"]["photos"]["images"]
    root = photographs(tmp_path / "test", 3, start=500, kind="scratch")
    photographs(root, 3, start=600)
    (path, *_) = [
        p for p, key in pixel_hashes((fitted / "photos/good").iterdir()).items() if key in used
    ]
    shutil.copy(path, root / "good" / "known.png")
    command = ["test", "--ckpt_path", str(checkpoint(fitted)), "--data.root", str(root)]
    command += ["--data.test_share", "0.999", "--output.folder", str(tmp_path / "out")]
    assert main(command) == 2
    assert "1 of 7 test images were calibrated on" in capsys.readouterr().err
    (root / "good" / "known.png").unlink()
    assert main(command) == 0


def test_a_test_on_the_images_of_a_calibration_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path / "photos", 6)
    options = [*SDP, "--data.category", "plank", "--output.root", str(tmp_path / "runs")]
    options += ["--output.name", "sdp"]
    assert main(["calibrate", *options, "--data.root", str(root)]) == 0
    tested = photographs(tmp_path / "test", 3, start=500, kind="scratch")
    photographs(tested, 3, start=600)
    shutil.copy(root / "good" / "001.png", tested / "good" / "renamed.png")
    command = ["test", *options, "--data.root", str(tested), "--data.test_share", "0.999"]
    command += ["--calibration.file", str(tmp_path / "runs" / "sdp" / "1-calibrate")]
    assert main(command) == 2
    assert "1 of 7 test images were calibrated on" in capsys.readouterr().err


def test_zero_shot_methods_are_calibrated_into_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path / "photos", 9)
    command = ["calibrate", *SDP, "--data.root", str(root), "--data.category", "plank"]
    command += ["--output.root", str(tmp_path / "runs"), "--output.name", "sdp"]
    assert main(command) == 0
    run = tmp_path / "runs" / "sdp" / "1-calibrate"
    assert sorted(path.name for path in run.iterdir()) == [
        "calibration.json",
        "config-calibrate.yaml",
    ]
    file = calibration_file(str(run))
    record = Calibration.read(file).categories["plank"]
    assert record.num_images == 6  # the other third gives the ranges of r0 and r1
    assert record.part_ranges is not None
    assert len(record.part_ranges) == 2
    assert len(record.images) == 9
    assert main([*command, "--calibration.seed", "1"]) == 0
    other = Calibration.read(
        tmp_path / "runs" / "sdp" / "2-calibrate" / "calibration.json"
    ).categories["plank"]
    assert other.part_ranges != record.part_ranges
    assert "anomalous above" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged", ["x", {"categories": ["photos"]}, {"categories": {"photos": {"images": [[]]}}}]
)
def test_a_damaged_calibration_is_replaced_by_a_new_one(
    fitted: Path, tmp_path: Path, damaged: object, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    file = checkpoint(tmp_path)
    torch.save({**content_of(tmp_path), "calibration": damaged}, file)
    words = ["--ckpt_path", str(file), "--data.root", str(fitted / "photos")]
    folder = ["--output.folder", str(tmp_path / "scores")]
    assert main(["predict", *words, *folder]) == 2
    assert "no calibration, or a damaged one" in capsys.readouterr().err
    assert main(["calibrate", *words]) == 0
    assert content_of(tmp_path)["calibration"]["categories"]["photos"]["n"] == 15


@pytest.mark.slow
def test_references_of_a_calibrated_fit_are_those_of_its_test(
    mvtec_root: Path, tmp_path: Path
) -> None:
    root, runs = regad_runs.three_categories(mvtec_root), tmp_path / "runs"
    fit = regad_runs.words("fit", root, runs, *regad_runs.ONE, "--calibrate", "true")
    assert main([*fit, "--output.name", "regad"]) == 0
    for verb in ("test", "predict"):  # refused if the references differ
        words = [verb, "--ckpt_path", str(runs / "regad" / "1-fit"), "--output.root", str(runs)]
        assert main([*words, "--output.page", "false", "--output.maps", "false"]) == 0


def test_a_calibration_on_the_first_images_only_is_told(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    root = photographs(tmp_path / "more", 5, start=600)
    command = ["calibrate", "--ckpt_path", str(checkpoint(tmp_path)), "--data.root", str(root)]
    assert main(command) == 0
    assert "only the first images" not in capsys.readouterr().err
    limit = ["--trainer.limit_predict_batches", "1", "--data.batch_size", "3"]
    assert main([*command, *limit]) == 0
    assert "limit_predict_batches 1: only the first images, by their" in capsys.readouterr().err
    assert content_of(tmp_path)["calibration"]["categories"]["photos"]["n"] == 3


@pytest.mark.slow
def test_reference_images_and_their_copies_are_not_calibrated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photographs(tmp_path / "photos", 8)
    for file in [*(root / "good").iterdir()]:
        shutil.copy(file, root / "good" / f"copy-{file.name}")
    words = [*SDP, "--model", "WinCLIP", "--model.backbone.pretrained", "demo"]
    words += ["--data.root", str(root), "--data.category", "plank"]
    calibration = tmp_path / "calibration"
    shots = ["--data.shots", "3"]
    assert main(["calibrate", *words, *shots, "--output.folder", str(calibration)]) == 0
    drawn = capsys.readouterr().err
    record = Calibration.read(calibration).categories["plank"]
    assert f"{8 - record.num_images} reference images are not calibrated on" in drawn
    assert record.num_images in (5, 6)  # two references may be copies of each other
    predict = ["predict", *words, "--output.root", str(tmp_path / "runs")]
    predict += ["--calibration.file", str(calibration)]
    assert main(predict) == 2
    message = "plank is compared with 0 reference images, but "
    assert message in capsys.readouterr().err
    assert main([*predict, *shots, "--output.maps", "false"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration.alpha", "0"], "calibration.alpha"),
        (["--calibration.alpha", "[]"], "one or more distinct rates"),
        (["--calibration.confidence", "95"], "calibration.confidence"),
        (["--calibration.folds", "5"], "calibration.folds needs fits"),
        (["--calibration.file=a.json"], "calibrate writes one"),
        (["--data.root", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_mistakes(
    fitted: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint(fitted).read_bytes()
    assert main(["calibrate", "--ckpt_path", str(checkpoint(fitted)), *words]) == 2
    assert message in capsys.readouterr().err
    assert checkpoint(fitted).read_bytes() == before


def test_unreadable_images_are_left_out_and_told(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    root = photographs(tmp_path / "more", 20, start=300)
    file = root / "good" / "310.png"
    file.write_bytes(file.read_bytes()[:60])
    command = ["calibrate", "--ckpt_path", str(checkpoint(tmp_path)), "--data.root", str(root)]
    assert main(command) == 1
    assert content_of(tmp_path)["calibration"]["categories"]["photos"]["n"] == 19
    assert "1 normal image could not be read, such as" in capsys.readouterr().err


def test_decisions_are_at_the_rate_of_the_latest_calibration(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    options = ["--ckpt_path", str(checkpoint(tmp_path)), "--data.root", str(fitted / "photos")]
    assert main(["calibrate", *options, "--calibration.alpha", "0.3"]) == 0
    predict = ["predict", *options, "--output.page", "false", "--output.maps", "false"]
    for number, (more, expected) in enumerate(
        [([], 0.3), (["--calibration.alpha", "0.05"], 0.05), (["--calibration.alpha=0.1"], 0.1)]
    ):
        folder = tmp_path / f"out-{number}"
        assert main([*predict, "--output.folder", str(folder), *more]) == 0
        section = json.loads((folder / "predict.json").read_text())["decisions"]
        assert section["alpha"] == expected


def test_a_predict_may_fail_on_anomalous_images(fitted: Path, tmp_path: Path) -> None:
    predict = ["predict", "--ckpt_path", str(checkpoint(fitted)), "--output.page", "false"]
    predict += ["--output.maps", "false", "--output.fail_on", "anomalous"]
    defects = photographs(tmp_path / "new", 3, start=700, kind="any")
    run = ["--output.folder", str(tmp_path / "out")]
    assert main([*predict, "--data.root", str(defects), *run]) == 3
    (defects / "any" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main([*predict, "--data.root", str(defects), *run]) == 3  # before unreadable images
    normal = photographs(tmp_path / "normal", 1, start=2)
    run = ["--output.folder", str(tmp_path / "other")]
    assert main([*predict, "--data.root", str(normal), *run]) == 0
