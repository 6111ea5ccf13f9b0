"""Decisions of ``predict`` and ``test``, by calibrations written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import PADIM, conditions_of, read_csv, section_of, write_photographs
from helpers import quiet_trainer
from PIL import Image

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.decisions.conformal import benjamini_hochberg, binomial_interval, p_values
from anomaly_clip.drawing.overlay import CONTOUR
from anomaly_clip.masks import read_mask
from anomaly_clip.methods import PaDiM
from anomaly_clip.recording.writer import RunWriter
from anomaly_clip.testing.processes import run_command


class Planks:
    """A fitted PaDiM, and a calibration of it with 19 images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fitted = folder / "fit" / "checkpoints" / "last.ckpt"
        train = write_photographs(folder / "train", 6, seed=0)
        fit = ["fit", *PADIM, f"--data.root={train}", "--data.normal=all"]
        assert main([*fit, f"--output.folder={folder / 'fit'}"]) == 0
        write_photographs(folder / "calibration", 19, seed=100)
        self.words = ["predict", f"--ckpt_path={self.fitted}"]
        shown = ["--output.page=false", "--output.maps=false"]
        words = [
            *self.words,
            f"--data.root={folder / 'calibration'}",
            "--data.normal=folders",
            *shown,
        ]
        self.conditions = conditions_of(words, folder, "PaDiM")
        rows = read_csv(folder / "conditions" / "scores.csv")
        self.scores = sorted(float(row["image_score"]) for row in rows)
        self.file = self.write()
        self.images = folder / "images"
        write_photographs(self.images / "good", 3, seed=200)
        write_photographs(self.images / "scratch", 2, seed=300, defect=9)
        write_photographs(self.images / "spot", 2, seed=400, defect=1)

    def write(self, name: str = "calibration.json", **changes: Any) -> Path:
        record = CategoryCalibration(tuple(self.scores), map_threshold=self.scores[-1])
        content = {
            "method": "PaDiM",
            "categories": {"planks": record},
            "conditions": self.conditions,
            **changes,
        }
        path = self.folder / name
        Calibration(**content).write(path)
        return path

    def run(self, verb: str, out: Path, *more: str, file: Path | None = None) -> int:
        words = [verb, f"--ckpt_path={self.fitted}", f"--data.root={self.images}"]
        words += ["--data.normal=folders", f"--output.folder={out}"]
        return main([*words, f"--calibration.file={file or self.file}", *more])


@pytest.fixture(scope="module")
def planks(tmp_path_factory: pytest.TempPathFactory) -> Planks:
    return Planks(tmp_path_factory.mktemp("planks"))


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_predict_decides_on_every_image(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planks.run("predict", tmp_path / "run") == 0
    rows = read_csv(tmp_path / "run" / "scores.csv")
    names = ["path", "category", "label", "image_score", "p_value", "decision", "weights"]
    assert list(rows[0]) == names
    scores = np.array([float(row["image_score"]) for row in rows])
    expected = [(1 + sum(s >= score for s in planks.scores)) / 20 for score in scores]
    assert [float(row["p_value"]) for row in rows] == pytest.approx(expected, abs=1e-12)
    decisions = ["anomalous" if p <= 0.05 else "normal" for p in expected]
    assert [row["decision"] for row in rows] == decisions
    assert decisions.count("anomalous") >= 2
    section = section_of(tmp_path / "run")
    assert section["alpha"] == 0.05
    assert section["source"] == str(planks.file)
    entry = section["categories"]["images"]
    assert entry["num_images"] == 7
    assert entry["num_anomalous"] == decisions.count("anomalous")
    assert (entry["n"], entry["k"], entry["average"]) == (19, 1, 0.05)
    assert entry["threshold"] == planks.scores[-1]
    assert entry["as_asked"] is True
    assert "recall" not in entry
    text = printed(capsys)
    assert f"images: {entry['num_anomalous']} of 7 images anomalous. {entry['sentence']}" in text


def test_without_a_calibration_predict_says_how_to_get_one(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*planks.words, f"--data.root={planks.images}", "--data.normal=folders"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}"]) == 0
    assert f"anomaly_clip calibrate --ckpt_path {planks.fitted} " in printed(capsys)
    assert "decision" not in read_csv(tmp_path / "run" / "scores.csv")[0]
    assert "decisions" not in json.loads((tmp_path / "run" / "predict.json").read_text())


def test_other_results_of_a_predict(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drift, masks of the image's size, overlays and the count for an exit code."""
    record = CategoryCalibration(tuple(planks.scores), map_threshold=planks.scores[9])
    file = planks.write("low.json", categories={"planks": record})
    assert planks.run("predict", tmp_path / "run", "--output.masks=true", file=file) == 0
    run = tmp_path / "run"
    rows = read_csv(run / "scores.csv")
    drift = read_csv(run / "drift.csv")
    assert list(drift[0]) == ["path", "category", "online_p_value", "log10_martingale"]
    assert [row["path"] for row in drift] == [row["path"] for row in rows]
    entry = section_of(run)["categories"]["images"]
    assert 10 ** max(float(row["log10_martingale"]) for row in drift) == pytest.approx(
        max(1.0, entry["drift"]["largest"]), rel=0.2
    )
    marked = 0
    for row in rows:
        name = Path(row["path"]).relative_to(planks.images).with_suffix(".png")
        mask = read_mask(run / "masks" / "images" / name)
        assert mask.shape == (40, 56)
        with Image.open(run / "masks" / "images" / name) as image:
            assert image.mode == "L"
            assert set(np.unique(np.asarray(image))) <= {0, 255}
        # Of PaDiM, the score is the highest map value.
        is_marked = float(row["image_score"]) > planks.scores[9]
        assert bool(mask.any()) == is_marked
        marked += is_marked and row["decision"] == "normal"
        with Image.open(run / "maps" / "images" / name) as sheet:
            panels = np.asarray(sheet.convert("RGB"))
        assert panels.shape[1] == 3 * 240 + 2 * 4  # image, overlay, map; no mask without labels
        assert bool((panels[-171:, 244:484] == CONTOUR).all(axis=-1).any()) == is_marked
    assert entry["normal_with_marked_pixels"] == marked > 0
    assert f"{marked} normal image" in printed(capsys)


@pytest.mark.slow
def test_masks_are_not_read_as_photographs(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = write_photographs(tmp_path / "photographs", 2, seed=600)
    words = [*planks.words, f"--data.root={photographs}", "--data.normal=folders"]
    words += [f"--calibration.file={planks.file}", "--output.masks=true"]
    assert main([*words, f"--output.folder={photographs}"]) == 2
    assert "among the images of data.root: give another --output.folder" in printed(capsys)
    assert len(list(photographs.iterdir())) == 2
    run = photographs / "run"
    assert main([*words, f"--output.folder={run}"]) == 0
    assert len(list((run / "masks").rglob("*.png"))) == 2
    capsys.readouterr()
    plain = [*planks.words, "--data.normal=folders", "--output.page=false"]
    assert main([*plain, f"--data.root={photographs}", f"--output.folder={tmp_path / 'a'}"]) == 0
    assert "not used: folders of results, such as run (1)" in printed(capsys)
    assert len(read_csv(tmp_path / "a" / "scores.csv")) == 2
    assert main([*plain, f"--data.root={run}", f"--output.folder={tmp_path / 'b'}"]) == 2
    assert not (tmp_path / "b").exists()


def test_the_false_discovery_rate(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planks.run("predict", tmp_path / "run", "--output.fdr=0.2", "--output.maps=false") == 0
    rows = read_csv(tmp_path / "run" / "scores.csv")
    values = [float(row["p_value"]) for row in rows]
    expected = benjamini_hochberg(values, 0.2).tolist()
    assert [row["decision"] == "anomalous" for row in rows] == expected
    section = section_of(tmp_path / "run")
    assert section["fdr"] == 0.2
    text = printed(capsys)
    assert "of the images called anomalous, at most 20 % are expected to be normal" in text


def test_a_test_adds_recall_and_false_alarms(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output.masks=true", "--output.page=false", "--output.fail_on=anomalous"]
    assert planks.run("test", tmp_path / "run", *options) == 0
    rows = read_csv(tmp_path / "run" / "scores.csv")
    assert list(rows[0])[3:6] == ["image_score", "p_value", "decision"]
    entry = section_of(tmp_path / "run")["categories"]["images"]
    for key, kinds in (("false_alarms", ["good"]), ("recall", ["scratch", "spot"])):
        chosen = [row for row in rows if Path(row["path"]).parent.name in kinds]
        count = sum(row["decision"] == "anomalous" for row in chosen)
        low, high = binomial_interval(count, len(chosen))
        value = count / len(chosen)
        expected = {"count": count, "total": len(chosen), "value": value, "low": low, "high": high}
        assert entry[key] == expected
    assert list(entry["kinds"]) == ["scratch", "spot"]
    assert entry["kinds"]["scratch"]["value"] == 1.0
    assert entry["drift"] is None
    assert not (tmp_path / "run" / "drift.csv").exists()
    masks = sorted((tmp_path / "run" / "masks").rglob("*.png"))
    assert len(masks) == 7
    with Image.open(masks[0]) as mask:
        assert mask.size == (32, 32)  # a test compares at the evaluated size
    text = printed(capsys)
    assert "output.fail_on anomalous has no effect on test" in text
    assert "decisions, false-alarm rate 5 %" in text
    assert "images scratch 2 100.0" in text
    assert main(["report", str(tmp_path / "run")]) == 0


def test_another_rate_than_that_of_the_calibration(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output.maps=false", "--output.page=false"]
    more = ["--calibration.alpha=0.5", *options]
    assert planks.run("predict", tmp_path / "half", *more) == 0
    section = section_of(tmp_path / "half")
    assert section["alpha"] == 0.5
    assert section["categories"]["images"]["k"] == 10
    assert "requested false-alarm rate 50 %" in printed(capsys)
    assert planks.run("predict", tmp_path / "few", "--calibration.alpha=0.01", *options) == 0
    entry = section_of(tmp_path / "few")["categories"]["images"]
    assert entry["as_asked"] is False
    assert "cannot be had" in printed(capsys)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "PatchCore"}, "is a calibration of PatchCore, but the method is PaDiM"),
    "parts": (
        {"categories": {"a": CategoryCalibration((1.0,), part_ranges=((0.0, 1.0),))}},
        "the ranges of 1 score parts for a, but PaDiM has 0",
    ),
    "categories": (
        {"categories": dict.fromkeys("ab", CategoryCalibration((1.0,)))},
        "the calibration has no category 'images'",
    ),
    "size": ({"image_size": 64}, "image_size is 32"),
    "weights": ({"fitted_sha256": "0"}, "the fitted weights differ"),
    "resize": ({"resize": "other"}, "was made with other"),
}


@pytest.mark.parametrize("verb", ["predict", "test"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_calibration_that_does_not_apply(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str
) -> None:
    changes, message = REFUSED[name]
    if not {"method", "categories"} & set(changes):
        changes = {"conditions": {**planks.conditions, **changes}}
    file = planks.write("other.json", **changes)
    assert planks.run(verb, tmp_path / "run", file=file) == 2
    assert message in printed(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output.masks=true"], "output.masks needs a calibration"),
        (["--output.fdr=0.1"], "output.fdr needs a calibration"),
        (["--output.fail_on=anomalous"], "output.fail_on anomalous needs a calibration"),
        (["--calibration.file=nowhere"], "calibration.file nowhere: there is no calibration.json"),
        (["--output.fdr=1.5"], "output.fdr must be in (0, 1)"),
        (["--output.fail_on=normal"], "output.fail_on"),
    ],
)
def test_options_without_a_calibration(
    planks: Planks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    words = [*planks.words, f"--data.root={planks.images}", "--data.normal=folders"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}", *options]) == 2
    assert message in printed(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("alpha", "code"), [(0.05, 3), (0.5, 3), (None, 0)])
def test_a_script_can_stop_at_an_anomalous_image(
    planks: Planks, tmp_path: Path, alpha: float | None, code: int
) -> None:
    options = ["--output.fail_on=anomalous", "--output.maps=false", "--output.page=false"]
    if alpha is None:  # no score is above the highest
        high = CategoryCalibration((1e9,))
        file = planks.write("high.json", categories={"planks": high})
    else:
        file = planks.file
        options += [f"--calibration.alpha={alpha}"]
    assert planks.run("predict", tmp_path / "run", *options, file=file) == code
    number = section_of(tmp_path / "run")["categories"]["images"]["num_anomalous"]
    assert bool(number) == (code == 3)


def test_masks_need_a_map_threshold(
    planks: Planks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {"planks": CategoryCalibration(tuple(planks.scores))}
    file = planks.write("maps.json", categories=records)
    assert planks.run("predict", tmp_path / "run", "--output.masks=true", file=file) == 2
    assert "output.masks needs a map threshold" in printed(capsys)
    assert planks.run("predict", tmp_path / "run", "--output.page=false", file=file) == 0
    entry = section_of(tmp_path / "run")["categories"]["images"]
    assert (entry["map_threshold"], entry["normal_with_marked_pixels"]) == (None, 0)


def test_an_unreadable_image_has_no_decision(planks: Planks, tmp_path: Path) -> None:
    images = tmp_path / "new"
    write_photographs(images, 2, seed=500)
    (images / "00.png").write_bytes(b"no image")
    words = [*planks.words, f"--data.root={images}", "--data.normal=folders"]
    words += [f"--calibration.file={planks.file}", "--output.masks=true"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}"]) == 1
    rows = read_csv(tmp_path / "run" / "scores.csv")
    assert [bool(row["decision"]) for row in rows] == [True, False, True]
    assert [bool(row["p_value"]) for row in rows] == [True, False, True]
    assert rows[1]["error"]
    assert len(read_csv(tmp_path / "run" / "drift.csv")) == 2
    assert section_of(tmp_path / "run")["categories"]["new"]["num_images"] == 2


def test_a_run_into_the_same_folder_replaces_the_decisions(planks: Planks, tmp_path: Path) -> None:
    assert planks.run("predict", tmp_path / "run", "--output.maps=false") == 0
    assert (tmp_path / "run" / "drift.csv").is_file()
    words = [*planks.words, f"--data.root={planks.images}", "--data.normal=folders"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}", "--output.maps=false"]) == 0
    assert not (tmp_path / "run" / "drift.csv").exists()
    assert "decision" not in read_csv(tmp_path / "run" / "scores.csv")[0]


def test_the_calibration_in_the_checkpoint_is_used_without_a_file(
    planks: Planks, tmp_path: Path
) -> None:
    checkpoint = torch.load(planks.fitted, weights_only=True)
    checkpoint["calibration"] = json.loads(planks.file.read_text())
    file = tmp_path / "last.ckpt"
    torch.save(checkpoint, file)
    words = ["predict", "--config", str(planks.folder / "fit" / "config-fit.yaml")]
    words += [f"--ckpt_path={file}", f"--data.root={planks.images}", "--data.normal=folders"]
    assert main([*words, f"--output.folder={tmp_path / 'run'}", "--output.maps=false"]) == 0
    assert section_of(tmp_path / "run")["source"] == str(file)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need.*")
def test_a_trainer_in_python_decides_too(planks: Planks, tmp_path: Path) -> None:
    """There, the checkpoint is read after the setup of the run."""
    checkpoint = torch.load(planks.fitted, weights_only=True)
    checkpoint["calibration"] = json.loads(planks.file.read_text())
    file = tmp_path / "last.ckpt"
    torch.save(checkpoint, file)
    backbone = CNNSettings(weights="random")
    for path, is_decided in ((file, True), (planks.fitted, False)):
        writer = RunWriter(folder=str(tmp_path / path.parent.name), maps=False, page=False)
        method = PaDiM(backbone, image_size=32, num_channels=8)
        data = ImageFolder(str(planks.images), num_workers=0)
        trainer = quiet_trainer(callbacks=[writer])
        trainer.predict(method, data, ckpt_path=path, return_predictions=False)
        rows = read_csv(writer.folder / "scores.csv")
        assert ("decision" in rows[0]) == is_decided
        assert (writer.num_anomalous > 0) == is_decided


def test_score_parts_of_sdp(tiny_sdp: list[str], tmp_path: Path) -> None:
    """In predict, the scaled sum replaces the text score; a test keeps the published score."""
    ranges = ((0.0, 1.0), (-2.0, 2.0))
    words = ["predict", *tiny_sdp, "--output.page=false", "--output.maps=false"]
    conditions = conditions_of(words, tmp_path, "SDP", part_ranges=ranges)
    record = CategoryCalibration((0.2, 0.9, 1.1), part_ranges=ranges)
    file = tmp_path / "c.json"
    Calibration("SDP", dict.fromkeys(("bottle", "metal_nut"), record), conditions).write(file)
    plain = read_csv(tmp_path / "conditions" / "scores.csv")
    for verb in ("predict", "test"):
        run = tmp_path / verb
        options = [f"--calibration.file={file}", f"--output.folder={run}", "--output.page=false"]
        assert main([verb, *tiny_sdp, *options, "--calibration.alpha=0.3"]) == 0
        rows = read_csv(run / "scores.csv")
        parts = np.array([[float(row["r0"]), float(row["r1"])] for row in rows])
        expected = parts[:, 0] + (parts[:, 1] + 2) / 4
        column = "image_score" if verb == "predict" else "decision_score"
        scores = np.array([float(row[column]) for row in rows])
        np.testing.assert_allclose(scores, expected, rtol=1e-12)
        p = p_values(scores, record.scores)
        assert [float(row["p_value"]) for row in rows] == p.tolist()
        assert [row["decision"] == "anomalous" for row in rows] == (scores > 1.1).tolist()
    assert [row["r0"] for row in rows] == [row["r0"] for row in plain]
    assert "decision_score" not in read_csv(tmp_path / "predict" / "scores.csv")[0]
    assert list(section_of(tmp_path / "test")["categories"]) == ["bottle", "metal_nut"]


@pytest.mark.slow
def test_two_processes_decide_as_one(planks: Planks, tmp_path: Path) -> None:
    options = ["--output.masks=true", "--output.fdr=0.3", "--data.batch_size=2"]
    words = [f"--ckpt_path={planks.fitted}", f"--data.root={planks.images}"]
    words += ["--data.normal=folders", f"--calibration.file={planks.file}", *options]
    for verb in ("predict", "test"):
        runs = [tmp_path / f"{verb}{number}" for number in (1, 2)]
        assert main([verb, *words, f"--output.folder={runs[0]}"]) == 0
        two = ["--trainer.strategy=ddp", "--trainer.devices=2"]
        done = run_command([verb, *words, f"--output.folder={runs[1]}", *two], 2)
        assert done.returncode == 0, done.stderr[-2000:]
        alone, shared = (read_csv(run / "scores.csv") for run in runs)
        for first, second in zip(alone, shared, strict=True):
            for key in first:  # in other batches, the last digits of scores differ
                if key != "image_score":
                    assert first[key] == second[key]
        entries = [section_of(run)["categories"] for run in runs]
        if verb == "predict":
            assert entries[0]["images"].pop("drift") is not None
            entries[1]["images"].pop("drift")
        assert entries[0] == entries[1]
        files = [sorted(p.relative_to(run) for p in run.rglob("*.png")) for run in runs]
        assert files[0] == files[1]
    other = planks.write("method.json", method="PatchCore")
    words[-1:] = ["--data.batch_size=2", f"--calibration.file={other}"]
    done = run_command(["predict", *words, f"--output.folder={tmp_path / 'no'}", *two], 2)
    assert done.returncode == 2
    assert done.stderr.count("is a calibration of PatchCore") == 1
    assert not (tmp_path / "no").exists()
