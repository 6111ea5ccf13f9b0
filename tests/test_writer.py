from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from run_folder import folders_on

from anomaly_clip.cli import main
from anomaly_clip.data import Demo
from anomaly_clip.methods import PatchCore
from anomaly_clip.metrics import METRICS
from anomaly_clip.recording.writer import RunWriter

Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny_sdp: list[str]) -> Command:
    """Return a function that builds a command line with the tiny CLIP on the tiny data set."""
    return lambda verb, *more: [verb, *tiny_sdp, *more]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_test_leaves_a_complete_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("test")) == 0
    run = tmp_path / "runs" / "sdp" / "1-test"
    names = {p.name for p in run.iterdir()}
    results = {"metrics.json", "metrics.csv", "scores.csv", "curves.json", "gallery", "report.html"}
    assert names == {"config-test.yaml", "logs", *results}
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"mean", "categories", "intervals", "run"}
    assert list(metrics["categories"]) == ["bottle", "metal_nut"]
    assert set(metrics["mean"]) == set(METRICS)
    for row in [metrics["mean"], *metrics["categories"].values()]:
        assert all(0 <= value <= 1 for value in row.values())
    assert metrics["run"]["seed"] == 0
    assert metrics["run"]["weights"]["random"] is True
    assert metrics["run"]["protocol"]["images"] == {"bottle": 4, "metal_nut": 4}
    assert metrics["run"]["protocol"]["anomalous"] == {"bottle": 2, "metal_nut": 2}
    table = read_csv(run / "metrics.csv")
    assert [row["category"] for row in table] == ["bottle", "metal_nut", "mean"]
    assert float(table[2]["pixel_pro"]) == metrics["mean"]["pixel_pro"]
    scores = read_csv(run / "scores.csv")
    assert len(scores) == 8
    assert list(scores[0]) == ["path", "category", "label", "image_score", "r0", "r1", "weights"]
    assert metrics["run"]["protocol"]["complete"] is True
    assert metrics["run"]["protocol"]["pro_steps"] == 200
    out = capsys.readouterr()
    assert "metal_nut" in out.out
    assert f"{100 * metrics['mean']['image_auroc']:.1f}" in out.out
    assert "8 images (4 anomalous) in 2 categories" in out.err
    assert f"report: {run / 'report.html'}" in out.err


def test_random_weights_are_named_next_to_all_metrics(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("test", "--output.maps=true")) == 0
    run = tmp_path / "runs" / "sdp" / "1-test"
    assert capsys.readouterr().out.count("RANDOM WEIGHTS") == 2
    for name in ("metrics.csv", "scores.csv"):
        assert {row["weights"] for row in read_csv(run / name)} == {"random"}, name
    assert read_csv(run / "logs" / "metrics.csv")[0]["test/random_weights"] == "1.0"
    sheet = np.asarray(Image.open(run / "maps" / "bottle" / "good" / "000.png")).astype(int)
    assert ((sheet[..., 0] - sheet[..., 1])[:60] > 100).any()  # the warning in red


def test_the_scores_are_those_that_were_evaluated(command: Command, tmp_path: Path) -> None:
    assert main(command("test")) == 0
    scores = read_csv(tmp_path / "runs" / "sdp" / "1-test" / "scores.csv")
    for category in ("bottle", "metal_nut"):
        rows = [row for row in scores if row["category"] == category]
        parts = np.array([[float(row["r0"]), float(row["r1"])] for row in rows])
        scaled = (parts - parts.min(0)) / (parts.max(0) - parts.min(0))
        ours = [float(row["image_score"]) for row in rows]
        np.testing.assert_allclose(ours, scaled.sum(1), atol=1e-4)


def test_maps_are_drawn_on_one_scale_per_category(command: Command, tmp_path: Path) -> None:
    assert main(command("test", "--output.maps=true")) == 0
    run = tmp_path / "runs" / "sdp" / "1-test"
    files = sorted(p.relative_to(run / "maps").as_posix() for p in run.rglob("*.png"))
    assert files == [
        f"{category}/{defect}/00{i}.png"
        for category in ("bottle", "metal_nut")
        for defect in ("good", "scratch")
        for i in (0, 1)
    ]
    brightest: dict[str, list[int]] = {}
    for path in run.rglob("*.png"):
        heat = np.asarray(Image.open(path))[-240:, 244:484].astype(int).sum(axis=2)
        brightest.setdefault(path.parts[-3], []).append(heat.max())
    for levels in brightest.values():
        assert max(levels) > 650  # one image per category reaches the end of the scale
        assert len(set(levels)) > 1  # the others do not
    assert not (run / ".scratch").exists()
    for defect, white in (("good", 0.0), ("scratch", 12 * 20 / (40 * 48))):
        with Image.open(run / "maps" / "bottle" / defect / "000.png") as sheet:
            mask = np.asarray(sheet)[-240:, 488:]
        assert (mask > 127).mean() == pytest.approx(white, abs=0.02)


def test_metrics_are_written_before_images_are_drawn(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anomaly_clip.recording.map_images.PanelRow", interrupt)
    assert main(command("test", "--output.maps=true")) == 130
    run = tmp_path / "runs" / "sdp" / "1-test"
    assert json.loads((run / "metrics.json").read_text())["mean"]["image_auroc"] is not None
    assert not (run / ".scratch").exists()


def test_a_partial_run_is_labelled(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--data.batch_size=2", "--trainer.limit_test_batches=3"]
    assert main(command("test", *limits)) == 0
    assert "PARTIAL: 6 of 8 images" in capsys.readouterr().out
    run = tmp_path / "runs" / "sdp" / "1-test"
    protocol = json.loads((run / "metrics.json").read_text())["run"]["protocol"]
    assert protocol["complete"] is False
    assert protocol["images"] == {"bottle": 4, "metal_nut": 2}
    limits = ["--data.batch_size=2", "--trainer.limit_predict_batches=1"]
    assert main(command("predict", *limits)) == 0
    assert "results of 2 images" in capsys.readouterr().err
    for verb in ("test", "predict"):
        assert main(command(verb, f"--trainer.limit_{verb}_batches=0", "--output.name=none")) == 2
        assert "no image was scored" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "none").glob("*"))


def test_predict_writes_scores_and_images(command: Command, tmp_path: Path) -> None:
    assert main(command("predict")) == 0
    run = tmp_path / "runs" / "sdp" / "1-predict"
    expected = {"config-predict.yaml", "predict.json", "scores.csv", "maps", "gallery"}
    expected |= {"report.html"}
    assert {p.name for p in run.iterdir()} == expected
    rows = read_csv(run / "scores.csv")
    assert len(rows) == len(list((run / "maps").rglob("*.png"))) == 8
    assert all(row["image_score"] == row["r0"] for row in rows)  # not rescaled over the data set
    assert main(command("predict", "--output.maps=false", "--output.name=plain")) == 0
    assert not (tmp_path / "runs" / "plain" / "1-predict" / "maps").exists()


def test_a_new_folder_is_created_on_first_access(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path / "runs"), "mine")
    assert not (tmp_path / "runs").exists()
    assert writer.folder == tmp_path / "runs" / "mine" / "1-run"
    assert writer.folder.is_dir()
    assert RunWriter(str(tmp_path / "runs"), "mine").folder.name == "2-run"
    assert writer.num_scored == 0


def test_a_run_without_a_result_leaves_no_new_folder(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path), "mine")
    writer.abandon()  # no folder yet
    for kept in (False, True):
        folder = writer.folder
        (folder / "config-test.yaml").touch()
        (folder / "logs").mkdir()
        (folder / ".scratch").mkdir()
        if kept:
            (folder / "metrics.json").touch()
        writer.abandon()
        assert folder.exists() == kept
        assert not (folder / ".scratch").exists()
    existing = tmp_path / "existing"
    existing.mkdir()
    writer = RunWriter(folder=str(existing))
    assert writer.folder == existing
    writer.abandon()
    assert existing.is_dir()  # it existed before the run


@pytest.mark.parametrize(
    ("stage", "file", "refused"),
    [
        ("predict", "metrics.json", True),
        ("test", "predict.json", True),
        ("test", "metrics.json", False),
        ("predict", "predict.json", False),
        ("fit", "metrics.json", False),
    ],
)
def test_results_of_test_and_predict_are_not_mixed(
    tmp_path: Path, stage: str, file: str, refused: bool
) -> None:
    (tmp_path / file).touch()
    writer = RunWriter(folder=str(tmp_path))
    writer.config = "a: 1"
    strategy = SimpleNamespace(broadcast=lambda folder: folder)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=True, loggers=[])
    if refused:
        with pytest.raises(ValueError, match=rf"{tmp_path} has the results of .*: give {stage}"):
            writer.setup(trainer, LightningModule(), stage)
        assert not (tmp_path / f"config-{stage}.yaml").exists()
    else:
        writer.setup(trainer, LightningModule(), stage)
        assert (tmp_path / f"config-{stage}.yaml").read_text() == "a: 1"


def test_a_folder_without_a_result_is_removed_unless_it_existed(tmp_path: Path) -> None:
    new = RunWriter(root=str(tmp_path / "runs"), name="a")
    assert new.folder == tmp_path / "runs" / "a" / "1-run"
    (new.folder / "config-test.yaml").write_text("")
    new.abandon()
    assert not (tmp_path / "runs" / "a" / "1-run").exists()
    existing = tmp_path / "existing"
    existing.mkdir()
    for folder, stays in ((existing, True), (tmp_path / "new", False)):
        writer = RunWriter(folder=str(folder))
        (writer.folder / "config-test.yaml").write_text("")
        writer.abandon()
        assert folder.exists() is stays
    kept = RunWriter(root=str(tmp_path / "runs"), name="b")
    (kept.folder / "scores.csv").write_text("")
    kept.abandon()
    assert kept.folder.is_dir()


def test_weights_of_an_earlier_fit_are_not_overwritten(tmp_path: Path) -> None:
    module: Any = SimpleNamespace(export_name="weights.pt", export=lambda folder: folder)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda value: value), is_global_zero=False
    )
    (tmp_path / "weights.pt").write_text("")
    writer = RunWriter(folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"weights\.pt exists: give another --output\.folder"):
        writer.setup(trainer, module, "fit")
    writer.resumed = True
    writer.setup(trainer, module, "fit")


def test_each_call_of_the_trainer_from_python_has_a_folder(tmp_path: Path) -> None:
    class Method(LightningModule):
        pass

    writer, named = (RunWriter(str(tmp_path), **more) for more in ({}, {"name": "mine"}))  # type: ignore[arg-type]
    fixed = RunWriter(folder=str(tmp_path / "here"))
    folders = []
    for current in (writer, named, fixed):
        for stage in ("fit", "test", "test"):
            current._begin(stage, Method())
            folders.append(current.folder.relative_to(tmp_path).as_posix())
    assert folders[:3] == ["Method/1-fit", "Method/2-test", "Method/3-test"]
    assert folders[3:6] == ["mine/1-fit", "mine/2-test", "mine/3-test"]
    assert folders[6:] == ["here"] * 3


@pytest.mark.slow
def test_a_run_from_python_has_a_checkpoint_metrics_and_a_page(tmp_path: Path) -> None:
    data = Demo(categories=["brass washer"], num_test=4, num_train=4, num_workers=0)
    method = PatchCore(
        backbone={"name": "squeezenet1_1", "weights": "random"},  # type: ignore[arg-type]
        layers=["features.7"],
        image_size=64,
    )
    writer = RunWriter(str(tmp_path))
    trainer = Trainer(logger=False, callbacks=[writer], max_epochs=1, enable_checkpointing=False)
    trainer.fit(method, datamodule=data)
    assert (writer.folder / "checkpoints" / "last.ckpt").is_file()
    trainer.test(method, datamodule=data)
    names = {file.name for file in writer.folder.iterdir()}
    assert names == {
        *("metrics.json", "metrics.csv", "scores.csv", "curves.json", "gallery", "report.html")
    }
    assert "started from Python" in (writer.folder / "report.html").read_text(encoding="utf-8")
    assert folders_on(writer.folder / "report.html", tmp_path) == []
    trainer.predict(method, datamodule=data)
    assert sorted(folder.name for folder in (tmp_path / "PatchCore").iterdir()) == [
        *("1-fit", "2-test", "3-predict")
    ]
