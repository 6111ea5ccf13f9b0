from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from probe_runs import fitted, wafers, words

from anomaly_clip.cli import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return wafers(tmp_path / "wafers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.optim.lr", "0"], "model.optim.lr must be above 0"),
        (["--model.optim.momentum", "1"], "model.optim.momentum must be in [0, 1)"),
        (["--model.optim.weight_decay", "-1"], "model.optim.weight_decay must be 0 or more"),
        (["--model.image_size", "16"], "model.image_size must be 32 or more"),
        (["--model.seed", "-1"], "model.seed must be 0 or more"),
        (["--trainer.max_epochs", "-1"], "set trainer.max_epochs to 1 or more, or set"),
        (["--model.backbone.name", "vgg11"], "backbone.layers: vgg11 has no pooled"),
        (["--model.backbone.weights", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (["--data.shots", "2"], "class Edge-Ring (and 2 more) has no training map: leave out"),
        (["--data.fraction", "0.5"], "class Edge-Ring (and 2 more) has no training map"),
        (["--data.synthesis.recipe", "nsa"], "leave out data.synthesis"),
        (["--data.targets", "multi"], "class Donut (and 5 more) has no training map"),
        (["--data.targets", "several"], "data.targets"),
        (["--data.split_seed", "-1"], "data.split_seed must be 0 or more"),
    ],
)
def test_mistakes_end_in_an_error_message(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(words(root, tmp_path / "runs", *options)) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/*"))


def test_data_without_classes(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(mvtec_root, tmp_path / "runs")
    line[line.index("MixedWM38")] = "MVTecAD"
    assert main(line) == 2
    assert "but MVTecAD has no class targets: use --data MixedWM38" in capsys.readouterr().err
    assert main(["each", *line[1:]]) == 1
    assert "MVTecAD has no class targets" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "one.npz", rng.integers(0, 3, (9, 52, 52)), np.zeros((9, 8), int))
    assert main(words(tmp_path / "one.npz", tmp_path / "runs")) == 2
    assert "LinearProbe needs at least 2 classes, and data.root" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/2*"))


def test_a_diverged_training_is_reported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(root, tmp_path, epochs=1)) == 0
    checkpoint = torch.load(fitted(tmp_path), weights_only=True)
    checkpoint["state_dict"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, fitted(tmp_path))
    line = ["test", "--ckpt_path", str(fitted(tmp_path)), "--output.root", str(tmp_path / "t")]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert "is NaN or infinite, because the training diverged: fit again with a lower" in err
    assert not list((tmp_path / "t").glob("*/*"))
