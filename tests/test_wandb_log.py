"""Data logged to W&B, read from the files that the wandb library writes offline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from run_folder import TWO, make_run

from anomaly_clip.cli import main
from anomaly_clip.recording.gallery import GAP
from anomaly_clip.recording.wandb_log import (
    _panels,
    finish_wandb_run,
    log_config,
    log_image,
    log_run,
    wandb_group,
)
from anomaly_clip.reporting.page import write_page
from anomaly_clip.results.run_files import GalleryImage

CONFIGS = Path(__file__).parent.parent / "configs"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside wandb


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_own"))


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[WandbLogger]:
    with finish_wandb_run():
        yield WandbLogger(project="test", save_dir=tmp_path)


def media(folder: Path, pattern: str) -> list[Path]:
    return sorted((folder / "wandb").glob(f"offline-run-*/files/media/{pattern}"))


def rows(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_configuration_has_command_line_names(logger: WandbLogger) -> None:
    config = "seed_everything: 3\nmodel:\n  class_path: SDP\n  init_args: {backbone: {name: a}}\n"
    log_config([logger], config, Path("runs/sdp/1-test"))
    log_config([logger], config, Path("runs/sdp/1-test"))  # as by a test after a fit
    logged = dict(logger.experiment.config)
    assert logged == {
        "seed_everything": 3,
        "model.class_path": "SDP",
        "model.backbone.name": "a",
        "run_folder": "runs/sdp/1-test",
    }


def test_a_finished_test_is_logged(tmp_path: Path, logger: WandbLogger) -> None:
    run = make_run(tmp_path / "run", TWO, pictures=8)
    write_page(run)
    added: list[Any] = []
    logger.experiment.log_artifact = added.append
    log_run([CSVLogger(tmp_path), logger], run)
    (table,) = media(tmp_path, "table/figures*.json")
    metrics = json.loads((run / "metrics.json").read_text())
    assert rows(table)["columns"] == ["category", *metrics["mean"]]
    assert rows(table)["data"] == [
        *([name, *row.values()] for name, row in metrics["categories"].items()),
        ["mean", *metrics["mean"].values()],
    ]
    (curve,) = media(tmp_path, "table/curves/image_roc*.json")
    exact = json.loads((run / "curves.json").read_text())
    points = [row for row in rows(curve)["data"] if row[1] == "cap"]
    assert [row[0] for row in points] == exact["cap"]["image_roc"][0]
    (report,) = (a for a in added if a.type == "report")  # tables are artifacts, too
    assert set(report.manifest.entries) == {
        "report.html",
        "metrics.json",
        "scores.csv",
        "curves.json",
        "config-test.yaml",
    }


def test_gallery_images_are_split_and_have_masks(tmp_path: Path, logger: WandbLogger) -> None:
    run = make_run(tmp_path / "run", TWO, pictures=3)  # two of the three are normal
    sheet = np.zeros((20, 3 * 30 + 2 * 4, 3), np.uint8)
    sheet[:, 34:64] = 100  # the heat map
    sheet[5:9, 68 + 10 : 68 + 20] = 255  # the mask
    Image.fromarray(sheet).save(run / "gallery" / "2.webp", lossless=True)
    log_run([logger], run)
    files = media(tmp_path, "images/pictures/hit_*.png")
    panels = [np.asarray(Image.open(file)) for file in files]
    assert [panel.shape for panel in panels] == [(20, 30, 3)] * 2
    assert sorted(int(panel.mean()) for panel in panels) == [0, 100]
    (mask,) = media(tmp_path, "images/mask/pictures/hit_*.png")
    with Image.open(mask) as image:
        marked = np.argwhere(np.asarray(image) == 1)
    assert marked.min(0).tolist() == [5, 10]
    assert marked.max(0).tolist() == [8, 19]


def test_a_missing_image_is_skipped(tmp_path: Path, logger: WandbLogger) -> None:
    log_image([logger], "validation", tmp_path / "none.png")
    assert media(tmp_path, "images/*") == []


def test_a_run_ends_with_its_context(tmp_path: Path) -> None:
    ends: list[int] = []

    def opened() -> WandbLogger:
        logger = WandbLogger(project="test", save_dir=tmp_path)
        run = logger.experiment
        finish = run.finish

        def noted(exit_code: int) -> None:
            ends.append(exit_code)
            finish(exit_code=exit_code)

        run.finish = noted
        return logger

    with finish_wandb_run():
        opened()
    assert wandb.run is None

    def fail() -> None:
        with finish_wandb_run():
            opened()
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert ends == [0, 1]
    mine = wandb.init(dir=tmp_path)
    with finish_wandb_run():
        WandbLogger(project="test", save_dir=tmp_path)
    assert wandb.run is mine  # opened outside the context, so it stays open
    mine.finish()


def test_a_group_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_group("runs/padim/1-test"):
        assert os.environ["WANDB_RUN_GROUP"] == "runs/padim/1-test"
    assert "WANDB_RUN_GROUP" not in os.environ
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    with wandb_group("runs/padim/1-test"):
        assert os.environ["WANDB_RUN_GROUP"] == "mine"
    assert os.environ["WANDB_RUN_GROUP"] == "mine"


@pytest.mark.filterwarnings("ignore::UserWarning")  # about few batches and existing files
def test_a_fit_and_its_test_are_logged(
    tmp_path: Path, tiny_clip_config: str, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(CONFIGS / "clip_ada.yaml"), "--data.root", str(mvtec_root)]
    words += ["--config", str(CONFIGS / "logger" / "wandb.yaml")]
    words += ["--model.backbone.name", tiny_clip_config, "--model.backbone.pretrained", "random"]
    words += ["--model.backbone.image_size", "32", "--model.feature_layer", "2"]
    words += ["--data.num_workers", "0", "--data.batch_size", "2", "--data.val_share", "0.5"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    words += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    words += ["--trainer.log_every_n_steps", "1"]
    assert main(["fit", *words]) == 0
    assert media(tmp_path / "runs", "images/validation_*.png")
    (checkpoint,) = tmp_path.glob("runs/clip_ada/1-fit/checkpoints/last.ckpt")
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 2
    assert media(tmp_path / "runs", "table/figures*.json")
    assert media(tmp_path / "runs", "images/pictures/miss_*.png")
    staged = (tmp_path / "wandb_own").rglob("staging/*")
    page = (tmp_path / "runs" / "clip_ada" / "2-test" / "report.html").read_bytes()
    assert any(file.read_bytes() == page for file in staged if file.is_file())
    assert wandb.run is None


@pytest.mark.parametrize("has_mask", [False, True])
def test_panels_of_a_gallery_image(
    has_mask: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [40, 120, 200] if has_mask else [40, 120]
    panels = [np.full((16, 16, 3), level, np.uint8) for level in levels]
    gap = np.zeros((16, GAP, 3), np.uint8)
    row = [part for panel in panels for part in (panel, gap)][:-1]
    Image.fromarray(np.concatenate(row, axis=1)).save(tmp_path / "a.png")
    created: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        wandb, "Image", lambda array, masks=None, caption="": created.append((array, masks))
    )
    _panels(GalleryImage(tmp_path / "a.png", "nut/a", "hit", "nut", True, 0.5, 0.1, has_mask, None))
    assert [array.shape for array, _ in created] == [(16, 16, 3)] * 2
    assert [int(array.mean()) for array, _ in created] == [40, 120]
    assert (created[0][1] is not None) == has_mask


def test_a_gallery_image_without_a_heat_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    created: list[Any] = []
    monkeypatch.setattr(wandb, "Image", lambda array, **_: created.append(array))
    image = GalleryImage(tmp_path / "a.png", "a", "closest", "nut", None, 0.5, 0.1, False, None)
    _panels(image._replace(has_heat=False))
    assert [array.shape for array in created] == [(16, 16, 3)]
