"""Fitting of detectors from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from calibrations import write_photographs

import anomaly_clip
from anomaly_clip.fitting import fit
from anomaly_clip.prediction import Prediction

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")

SMALL: dict[str, Any] = {
    "backbone": {"weights": "random"},
    "model": {"image_size": 32, "layers": ["layer1"]},
    "data": {"num_workers": 0},
    "device": "cpu",
}
PADIM = {**SMALL, "model": {**SMALL["model"], "num_channels": 8}}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "steel_parts" / "good", 40, seed=0)


def test_one_call_gives_a_detector_that_decides(good: Path, tmp_path: Path) -> None:
    """A folder called good is all normal, and its category has the name of the folder above."""
    assert anomaly_clip.fit is fit
    detector = fit("patchcore", good, **SMALL)
    assert detector.category == "steel parts"
    assert detector.guarantee().startswith("With these 19 calibration images, at most 5 % false")
    assert detector.preprocessing.resize.rule == "square"
    new = write_photographs(tmp_path / "new", 2, seed=100, defect=8)
    predictions = detector.predict(new)
    assert all(isinstance(prediction, Prediction) for prediction in predictions)
    assert {prediction.decision for prediction in predictions} <= {"normal", "anomalous"}
    assert predictions[0].mask is not None
    assert repr(detector).startswith("<Detector: PatchCore of the fit on ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "new", "steel_parts"]


def test_a_kept_run_is_that_of_the_command_line(good: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    detector = fit(
        "padim", good.parent, folder=run, alpha=0.1, category="bolt", **PADIM, seed_everything=3
    )
    config = yaml.safe_load((run / "config-fit.yaml").read_text())
    assert config["model"]["class_path"] == "anomaly_clip.methods.PaDiM"
    assert config["data"]["class_path"] == "anomaly_clip.data.ImageFolder"
    assert config["data"]["init_args"]["category"] == "bolt"
    assert config["model"]["init_args"]["sigma"] == 4.0
    assert (config["seed_everything"], config["calibration"]["alpha"]) == (3, 0.1)
    again = anomaly_clip.load(run, device="cpu")
    image = good / "0.png"
    assert again.predict(image).score == detector.predict(image).score
    assert detector.calibration is not None
    assert detector.calibration.alphas == (0.1,)


@pytest.mark.parametrize(
    ("configuration", "options", "rule"),
    [
        (
            "padim.yaml",
            {
                "data": {"class_path": "ImageFolder", "num_workers": 0},
                "model": {**PADIM["model"], "image_size": 224},
            },
            "shorter_crop",
        ),
        ("own_padim", {}, "square"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*sees only the centre.*")
def test_a_file_is_used_as_it_is(
    good: Path, configuration: str, options: dict[str, Any], rule: str
) -> None:
    detector = fit(configuration, good, calibrate=False, **{**PADIM, **options})
    assert detector.preprocessing.resize.rule == rule
    assert detector.calibration is None


@pytest.mark.slow
def test_a_method_without_a_configuration_for_own_images_sees_them_whole(good: Path) -> None:
    options = {**SMALL, "trainer": {"max_epochs": 1, "limit_train_batches": 1}}
    detector = fit("simplenet", sorted(good.glob("*.png"))[:6], calibrate=False, **options)
    assert type(detector.method).__name__ == "SimpleNet"
    assert detector.preprocessing.resize.rule == "square"


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("sdp", r"sdp: SDP is zero-shot: load it with anomaly_clip.load, without a fit"),
        ("tab", r"tab: TAB is no detector: fit one, such as patchcore"),
        ("padimm", r"padimm: neither a file nor a configuration .*; did you mean padim\?"),
    ],
)
def test_what_cannot_be_fitted(good: Path, configuration: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(configuration, good, device="cpu")


def test_images_that_are_not_known_to_be_normal(good: Path, tmp_path: Path) -> None:
    mixed = good.rename(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"set --data.normal all .*\(from Python: as keyword"):
        fit("padim", mixed, **PADIM)
    options = {**PADIM, "data": {"num_workers": 0, "normal": "all"}}
    assert fit("padim", mixed, calibrate=False, **options).category == "mixed"
    with pytest.raises(ValueError, match="nowhere"):
        fit("padim", tmp_path / "nowhere", **PADIM)
    with pytest.raises(ValueError, match=r"is empty|no image"):
        fit("padim", [], **PADIM)


def test_arguments_are_not_lost(good: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 0.1, "calibrate": False}, "alpha 0.1: without a calibration nothing is decided"),
        ({"output": {"folder": "runs/a"}}, "option output.folder: give the argument folder of fit"),
        ({"data.root": "other"}, "option data.root: give the argument images of fit"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            fit("patchcore", good, **options)
    arrays: Any = [np.zeros((4, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match="the images of a fit are files: give their paths"):
        fit("patchcore", arrays)
