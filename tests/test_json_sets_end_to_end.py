"""Training on one ``meta.json`` data set and testing on another, as in the public repositories."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docs_fixtures import write_meta_json
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import MetaJSON

TRAINED, TESTED = ("bottle", "carpet"), ("candle", "cashew")
METHODS = {"AnomalyCLIP": "prompts.pth", "APRILGAN": "linear_layers.pth"}
"""The file that a fit writes, by method."""


@pytest.fixture
def words(tmp_path: Path, tiny_clip_config: str) -> list[str]:
    """Return options of the two data sets and a tiny CLIP."""
    write_meta_json(tmp_path / "tested", TESTED, seed=1)
    write_meta_json(tmp_path / "trained", TRAINED, seed=2)
    words = ["--data", "MetaJSON", "--data.root", str(tmp_path / "tested")]
    words += ["--data.auxiliary", "MetaJSON", "--data.auxiliary.root", str(tmp_path / "trained")]
    words += ["--model.backbone.name", tiny_clip_config, "--model.backbone.pretrained", "random"]
    words += ["--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    return [*words, "--output.root", str(tmp_path / "runs")]


def metrics_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_names_and_masks_of_both_files(tmp_path: Path, words: list[str], method: str) -> None:
    fit = ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    assert main(["fit", "--model", method, *words, *fit]) == 0
    run = tmp_path / "runs" / method / "1-fit"
    test = ["--output.root", str(tmp_path / "tests"), "--output.maps", "true"]
    assert main(["test", "--ckpt_path", str(run), *test]) == 0
    folder = tmp_path / "tests" / method / "1-test"
    metrics = metrics_of(folder)
    assert set(metrics["categories"]) == set(TESTED)
    protocol = metrics["run"]["protocol"]
    assert (protocol["data"], protocol["auxiliary"]) == ("MetaJSON", "MetaJSON")
    assert protocol["words"] == {name: name for name in TESTED}
    assert protocol["fitted"] is True
    assert metrics["mean"]["pixel_auroc"] is not None
    with (folder / "scores.csv").open(encoding="utf-8") as file:
        rows = {Path(row["path"]): row for row in csv.DictReader(file)}
    samples = MetaJSON(str(tmp_path / "tested")).samples("test")
    assert len(rows) == len(samples) == 12
    for sample in samples:
        (row,) = (row for path, row in rows.items() if sample.image.samefile(path))
        assert (row["category"], row["label"]) == (sample.category, str(int(sample.label)))
        assert (sample.mask is None) == (not sample.label)
    masks = [np.asarray(Image.open(s.mask)) > 0 for s in samples if s.mask is not None]
    assert all(mask.sum() == 12 * 20 for mask in masks)

    # The file that the fit wrote gives the same numbers.
    option = "prompts_file" if method == "AnomalyCLIP" else "linear_layers"
    borrowed = [f"--model.{option}", str(run / METHODS[method])]
    borrowed += ["--output.root", str(tmp_path / "borrowed")]
    assert main(["test", "--model", method, *words, *borrowed]) == 0
    again = metrics_of(tmp_path / "borrowed" / method / "1-test")
    assert again["categories"] == metrics["categories"]
    assert again["run"]["protocol"]["auxiliary"] is None


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_model_for_each_category(tmp_path: Path, words: list[str], method: str) -> None:
    options = ["--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    assert main(["each", "--model", method, *words, *options]) == 0
    metrics = metrics_of(tmp_path / "runs" / method / "1-each")
    assert set(metrics["categories"]) == set(TESTED)
