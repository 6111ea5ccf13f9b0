from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from probe_runs import fitted, wafers, words
from torchvision.models import resnet18

from anomaly_clip.cli import main
from anomaly_clip.data.samples import Sample
from anomaly_clip.methods.linear_probe_classes import check_same, check_shown


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    for name in ("other.pt", "copy.pt"):
        torch.manual_seed(3)
        torch.save(resnet18(weights=None).state_dict(), tmp_path / name)
    return tmp_path / "other.pt"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (1, "the maps cannot be split so that both parts contain every class"),
        (2, "class Near-full has no test map: raise data.test_share, or try another"),
    ],
)
def test_a_class_missing_from_a_split_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: int, message: str
) -> None:
    wafers(tmp_path / "wafers", extra=extra)
    line = words(tmp_path / "wafers", tmp_path / "runs", "--data.test_share", "0.15")
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.slow
def test_mistakes_with_a_checkpoint(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat(np.eye(8, dtype=int), 5, axis=0)
    np.savez(tmp_path / "MixedWM38.npz", rng.integers(0, 3, (40, 52, 52)), targets)
    root, runs = tmp_path / "MixedWM38.npz", tmp_path / "runs"
    assert main(words(root, runs, epochs=1)) == 0
    other = wafers(tmp_path / "other")
    unfitted = words(root, runs, verb="test")
    cases = {
        "LinearProbe must be fitted first: give a checkpoint of a fit with --ckpt_path": unfitted,
        "fitted with data.targets single (8 classes), but the data is read with data.targets "
        "multi (8 classes): set data.targets to single": ["--data.targets", "multi"],
        "the 8 classes that the probe was fitted with and the 4 classes of the data are not": [
            "--data.root",
            str(other),
        ],
        "the checkpoint was trained with resnet18 (weights random, sha256 ": [
            "--model.backbone.weights",
            str(weights),
        ],
        "model.frozen is False": ["--model.frozen", "false"],
    }
    for message, options in cases.items():
        line = options
        if options is not unfitted:
            config = ["--config", str(runs / "LinearProbe" / "1-fit" / "config-fit.yaml")]
            line = ["test", *config, "--ckpt_path", str(fitted(runs)), *options]
        assert main(line) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in (runs / "LinearProbe").iterdir()] == ["1-fit"]
    assert not list(runs.glob("config-fit/*"))


def test_the_data_must_have_the_fitted_classes() -> None:
    check_same(("multi", ["a", "b"]), ("multi", ["a", "b"]), "the data")
    with pytest.raises(ValueError, match=r"targets single \(2 classes\), but the test is read"):
        check_same(("single", ["a", "b"]), ("multi", ["a", "b"]), "the test")
    with pytest.raises(ValueError, match=r"3 classes of the test are .*: c is in only one of"):
        check_same(("single", ["a", "b"]), ("single", ["a", "b", "c"]), "the test")
    with pytest.raises(ValueError, match="only their order differs"):
        check_same(("single", ["a", "b"]), ("single", ["b", "a"]), "the test")


@pytest.mark.parametrize(
    ("split", "has_shots", "way_out"),
    [
        ("test", True, r"raise data\.test_share, or try another data\.split_seed"),
        ("training", False, r"try another data\.split_seed"),
        ("training", True, r"leave out data\.shots and data\.fraction"),
    ],
)
def test_a_split_shows_every_class(split: str, has_shots: bool, way_out: str) -> None:
    data: Any = SimpleNamespace(root="here", has_shots=has_shots)
    rows = [(True, False, False), (False, False, True), (True, False, True)]
    shown = [Sample(Path("a"), "a", True, target=row) for row in rows]
    second = Sample(Path("b"), "a", True, target=(False, True, False))
    check_shown(data, ["a", "b", "c"], split, [*shown, second])
    with pytest.raises(ValueError, match=rf"here: class b has no {split} map: {way_out}"):
        check_shown(data, ["a", "b", "c"], split, shown)
    with pytest.raises(ValueError, match=rf"class b \(and 1 more\) has no {split} map"):
        check_shown(data, ["a", "b", "c"], split, shown[:1])
