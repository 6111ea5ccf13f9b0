"""Methods in three processes, which cannot share seven and five images equally."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL_CLIP, save_picture, sdp_plus_command
from layouts import visa
from safetensors.torch import load_file

from anomaly_clip.testing.processes import run_command

pytestmark = pytest.mark.slow

Command = Callable[..., list[str]]
DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "3"]


def run(words: list[str], processes: int) -> str:
    done = run_command([*words, *(DDP if processes > 1 else [])], processes)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.fixture(scope="module")
def bottles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a category in MVTec-AD's layout: 7 images to train, 3 normal and 2 others to test."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "mvtec"

    def save_noise(name: str) -> None:
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(root / "bottle" / name, array)

    for number in range(7):
        save_noise(f"train/good/{number}.png")
        if number < 3:
            save_noise(f"test/good/{number}.png")
        if number < 2:
            save_noise(f"test/cut/{number}.png")
            mask = np.zeros((40, 40), np.uint8)
            mask[5:20, 8:30] = 255
            save_picture(root / "bottle" / "ground_truth" / "cut" / f"{number}_mask.png", mask)
    return root


@pytest.fixture
def command(
    request: pytest.FixtureRequest, bottles: Path, tiny_clip_config: str, tmp_path: Path
) -> Command:
    """Return a function that returns the command line of a verb, with more options."""
    name: str = request.param
    if name == "SDPPlus":
        auxiliary = visa(tmp_path / "visa")
        runs = tmp_path / "runs"
        return lambda verb, *more: [
            *sdp_plus_command(bottles, auxiliary, tiny_clip_config, runs, verb),
            "--trainer.max_epochs=2",
            *more,
        ]
    line = ["--model", name, "--model.backbone.weights", "random", "--model.image_size", "64"]
    line += {
        "RD4AD": ["--model.backbone.name=resnet18"],
        "SimpleNet": ["--model.pretrain_dim=24", "--model.target_dim=16", "--model.hidden=8"],
        "PaDiM": ["--model.num_channels=8"],
        "PatchCore": ["--model.coreset=0.5"],
    }[name]
    if name in ("RD4AD", "SimpleNet"):
        line += ["--trainer.max_epochs=2"]
    line += ["--data", "MVTecAD", "--data.root", str(bottles), "--data.num_workers", "0"]
    line += ["--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    line += ["--output.root", str(tmp_path / "runs")]
    return lambda verb, *more: [verb, *line, *more]


def files_of(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}


def scores_of(run: Path) -> list[dict[str, str]]:
    with (run / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "command", ["SDPPlus", "RD4AD", "SimpleNet", "PaDiM", "PatchCore"], indirect=True
)
def test_three_processes_learn_together_and_test_as_one(command: Command, tmp_path: Path) -> None:
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    fit = command("fit", "--output.name=fit", "--trainer.callbacks+", json.dumps(compared))
    run(fit, 3)
    record = json.loads((tmp_path / "c").read_text())
    assert record["equal"]
    sizes = {len(rows) for rows in record["rows"]}
    trained = [row for rows in record["rows"] for row in rows]
    if "PaDiM" in fit or "PatchCore" in fit:
        assert sorted(trained) == list(range(7))
    else:
        assert len(sizes) == 1  # of each epoch of seven, or of ten, the last image is left out
        assert max(trained.count(row) for row in trained) <= 2
    folder = tmp_path / "runs" / "fit" / "1-fit"
    tests = []
    for processes in (1, 3):
        test = command("test", f"--output.name=test{processes}")
        run([*test, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")], processes)
        tests.append(tmp_path / "runs" / f"test{processes}" / "1-test")
    assert files_of(tests[0]) == files_of(tests[1])
    contents: list[Any] = [json.loads((test / "metrics.json").read_text()) for test in tests]
    # Batches of other sizes round differently, and pixels with nearly equal scores change places.
    assert contents[1]["mean"] == pytest.approx(contents[0]["mean"], abs=1e-3)
    rows = [scores_of(test) for test in tests]
    assert [row["path"] for row in rows[0]] == [row["path"] for row in rows[1]]
    for alone, shared in zip(*rows, strict=True):
        assert float(shared["image_score"]) == pytest.approx(
            float(alone["image_score"]), rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("command", ["PatchCore"], indirect=True)
def test_three_processes_share_the_memory_of_a_bank(command: Command, tmp_path: Path) -> None:
    # Room for 407 of the 448 patches, so for 135 of the 192 in the process with three images.
    run(command("fit", "--output.name=fit", "--model.memory_gb=0.00205"), 3)
    file = tmp_path / "runs" / "fit" / "1-fit" / "checkpoints" / "last.ckpt"
    bank = torch.load(file, weights_only=True)["state_dict"]["bank"]
    assert bank.shape == (203, 384)  # half of 407, which is less than half of 448
    assert len(bank.unique(dim=0)) == 203


@pytest.mark.parametrize("command", ["RD4AD"], indirect=True)
def test_batch_norm_alone_makes_a_difference(command: Command, tmp_path: Path) -> None:
    states = []
    fixed = ["--trainer.callbacks+", "ddp_checks.FixedStatistics", "--trainer.max_epochs=1"]
    for processes, size in ((1, 6), (3, 2)):  # the seventh image is left out by both
        more = [f"--data.batch_size={size}", f"--output.name=fit{processes}", *fixed]
        err = run(command("fit", *more, "--trainer.limit_train_batches=1"), processes)
        assert "BatchNorm" not in err
        file = tmp_path / "runs" / f"fit{processes}" / "1-fit" / "checkpoints" / "last.ckpt"
        states.append(torch.load(file, weights_only=True)["state_dict"])
    # Adam's first step has the sign of the gradient, which rounding flips where it is tiny.
    for name, value in states[0].items():
        different = (states[1][name].float() - value.float()).abs() > 1e-5
        assert different.float().mean() < 0.02, name


def test_three_processes_train_a_clip(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(SMALL_CLIP))
    line = ["fit", "--model", "Contrastive", "--model.backbone.name", str(tmp_path / "tiny.json")]
    line += ["--model.backbone.pretrained", "random", "--model.windows", "{32: 0.7}"]
    line += ["--data", "Demo", "--data.categories", "[oak wood board]"]
    line += ["--data.train_categories", "[steel washer, blue denim cloth]"]
    line += ["--data.num_scenes", "6", "--data.picture_size", "64", "--data.batch_size", "2"]
    line += ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.max_epochs=1"]
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    line += ["--trainer.callbacks+", json.dumps(compared), "--output.root", str(tmp_path / "runs")]
    err = run(line, 3)
    assert "BatchNorm" not in err
    assert json.loads((tmp_path / "c").read_text())["equal"]
    weights = load_file(tmp_path / "runs" / "Contrastive" / "1-fit" / "clip.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
