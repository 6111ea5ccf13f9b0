"""Sources of a detector: runs, checkpoints, configurations, methods in memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calibrations import PADIM, read_csv, write_photographs
from helpers import WORDS, Golden, quiet_trainer
from torchvision.models import resnet18

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.backbones.prompts import RVSSettings
from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.detector import load
from anomaly_clip.loading import find_device, load_method, option_words
from anomaly_clip.methods import SDP, PaDiM

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")

DEMO: dict[str, Any] = {"backbone": {"pretrained": "demo"}, "device": "cpu"}
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a fit of PaDiM in ``fit``, with weights in ``weights.pt``."""
    folder = tmp_path_factory.mktemp("loading")
    write_photographs(folder / "parts" / "good", 5, seed=0)
    torch.manual_seed(3)
    torch.save(resnet18(weights=None).state_dict(), folder / "weights.pt")
    words = [word for word in PADIM if "weights" not in word]
    words += [f"--model.backbone.weights={folder / 'weights.pt'}"]
    words += [f"--data.root={folder / 'parts'}", f"--output.folder={folder / 'fit'}"]
    assert main(["fit", *words]) == 0
    return folder


def message_of(source: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load(source, **{"device": "cpu", **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_its_checkpoint_and_a_copy_elsewhere_are_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / "fit" / "checkpoints" / "last.ckpt"
    copy = Path(shutil.copy(file, tmp_path / "model.ckpt"))
    monkeypatch.chdir(tmp_path)
    detectors = [load(s, device="cpu") for s in (place / "fit", str(file), copy, "model.ckpt")]
    assert len({detector.predict(IMAGE).score for detector in detectors}) == 1
    assert {detector.category for detector in detectors} == {"parts"}


@pytest.mark.golden
@pytest.mark.parametrize("method", ["padim", "patchcore", "rd4ad", "simplenet", "clip_ada"])
def test_runs_of_version_0_1_0_score_as_they_did(
    method: str, golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden("checkpoints").folder / "0.1.0")
    rows = read_csv(Path(method, "test", "scores.csv"))
    detector = load(Path(method, "fit"), device="cpu")
    predictions = detector.predict([row["path"] for row in rows])
    expected = [float(row["image_score"]) for row in rows]
    assert [p.score for p in predictions] == pytest.approx(expected, rel=1e-5)


@pytest.mark.golden
def test_a_model_configuration_that_has_moved_is_named(
    golden: Callable[[str], Golden], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = golden("checkpoints").folder / "0.1.0"
    monkeypatch.chdir(tmp_path)  # the checkpoint has relative paths
    assert 'name it with backbone={"name": FILE}' in message_of(folder / "clip_ada" / "fit")
    files = {"name": str(folder / "clip.json"), "pretrained": str(folder / "clip.pt")}
    load(folder / "clip_ada" / "fit", backbone=files, device="cpu")


def test_weights_that_have_moved_are_named(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fit"
    shutil.copytree(place / "fit", copy)
    moved = tmp_path / "moved.pt"
    score = load(copy, device="cpu").predict(IMAGE).score
    shutil.move(place / "weights.pt", moved)
    try:
        message = message_of(copy)
        assert str(place / "weights.pt") in message
        assert 'name it with backbone={"weights": FILE}' in message
        detector = load(copy, backbone={"weights": str(moved)}, device="cpu")
        assert detector.predict(IMAGE).score == score
        assert message_of(copy, backbone={"weight": "random"}) == (
            "backbone weight: no such setting; there are name, weights, layers, mean, std"
        )
        other = message_of(copy, backbone={"weights": "random"})
        assert "the checkpoint was trained with resnet18" in other
    finally:
        shutil.move(moved, place / "weights.pt")


def test_preprocessing_of_an_earlier_checkpoint_is_that_of_its_configuration(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "fit"
    shutil.copytree(place / "fit", run)
    file = run / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    del content["preprocessing"]
    torch.save(content, file)
    assert (
        load(run, device="cpu").predict(IMAGE).score
        == load(place / "fit", device="cpu").predict(IMAGE).score
    )
    shutil.move(file, tmp_path / "alone.ckpt")
    message = message_of(tmp_path / "alone.ckpt")
    assert "does not tell how its images were resized: put the config-fit.yaml" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sdq", "sdq: neither a run, .* nor a configuration of the package; did you mean sdp?"),
        ("runs/nowhere/1", "neither a run, a checkpoint or a configuration file"),
        ("patchcore", r"PatchCore must be fitted first: use anomaly_clip.fit\("),
        ("tab", "TAB scores no images: use fit|TAB is no detector"),
        ("linear_probe", "no detector|must be fitted"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    options = {"backbone": {"weights": "random"}} if source in ("patchcore", "tab") else {}
    if source == "linear_probe":
        options = {"backbone": {"weights": "random"}}
    assert re.search(message, message_of(source, **options))


def test_files_and_folders_that_are_no_sources(place: Path, tmp_path: Path) -> None:
    image = place / "parts" / "good" / "0.png"
    assert "0.png: not a checkpoint that can be read safely" in message_of(image)
    assert "the folder has no checkpoint (it has good)" in message_of(place / "parts")
    (tmp_path / "calibration.json").write_text("{}")
    assert "calibration.json is a calibration, not a detector: load the run" in message_of(
        tmp_path / "calibration.json"
    )
    (tmp_path / "empty.yaml").write_text("")
    assert "empty.yaml is empty" in message_of(tmp_path / "empty.yaml")
    (tmp_path / "bad.yaml").write_text("model: {class_path: SDP, init_args: {sigmo: 3}}\n")
    assert "did you mean sigma?" in message_of(tmp_path / "bad.yaml")


def test_settings_of_a_fit_are_fixed(place: Path) -> None:
    assert message_of(place / "fit", model={"sigma": 3}).startswith("option model: ")
    assert "uses no reference images" in message_of(place / "fit", references=place / "parts")
    assert "uses no reference images" in message_of("sdp", references=place / "parts", **DEMO)


def test_arguments_are_checked(place: Path) -> None:
    assert message_of("sdp", category=" ") == (
        "category ' ' is empty: name the object in the images, such as \"plank\""
    )
    assert message_of("sdp", device="gpu").startswith("device gpu is not available: give cpu")
    assert message_of("sdp", backbone="demo").startswith("backbone 'demo': give its settings")
    detector = load("sdp", **DEMO)
    with pytest.raises(ValueError, match=r"name it, such as category="):
        detector.predict(IMAGE)
    wrong: Any
    for wrong, kind in ((" ", "is empty"), (3, "is not a text")):
        with pytest.raises(ValueError, match=rf"category {wrong!r} {kind}: name the object"):
            detector.predict(IMAGE, category=wrong)


def test_a_class_of_another_module_is_not_imported(place: Path, tmp_path: Path) -> None:
    content = torch.load(place / "fit" / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "evil.Method"
    torch.save(content, tmp_path / "evil.ckpt")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    assert "imports no code: import the class in Python" in message_of(tmp_path / "evil.ckpt")
    assert "evil" not in sys.modules
    run = tmp_path / "run"
    run.mkdir()
    (run / "config-test.yaml").write_text("model: {class_path: evil.Method}\n")
    assert "names code outside this package (evil.Method)" in message_of(run)


def test_a_configuration_file_is_taken_with_its_options(tmp_path: Path) -> None:
    settings = {"backbone": {"pretrained": "demo", "name": "demo"}, "sigma": 3.0}
    data = {"class_path": "ImageFolder", "init_args": {"root": "x", "category": "bolt"}}
    content = {"model": {"class_path": "SDP", "init_args": settings}, "data": data}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    detector = load(file, device="cpu")
    assert (detector.category, detector.method.sigma) == ("bolt", 3.0)
    assert detector.preprocessing.words == {"bolt": "bolt"}
    words = {"bolt": "steel bolt"}
    options: dict[str, Any] = {"model.sigma": 5}
    changed = load(file, device="cpu", data={"words": words}, **options)
    assert changed.method.sigma == 5.0
    assert changed.method.words("bolt") == "steel bolt"
    assert changed.predict(IMAGE).score != detector.predict(IMAGE).score
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.yaml", "cache"}


@pytest.mark.slow
def test_the_run_of_a_zero_shot_method_is_a_source(tmp_path: Path) -> None:
    write_photographs(tmp_path / "parts" / "good", 12, seed=0)
    words = ["--config=own_images", f"--data.root={tmp_path / 'parts'}", "--data.category=bolt"]
    words += ["--data.num_workers=0", "--model.backbone.pretrained=demo", "--model.sigma=2"]
    words += ["--trainer.accelerator=cpu"]
    assert main(["predict", *words, f"--output.folder={tmp_path / 'predict'}"]) == 0
    detector = load(tmp_path / "predict", device="cpu")
    assert (detector.category, detector.method.sigma) == ("bolt", 2.0)
    assert detector.calibration is None
    assert main(["test", *words, f"--output.folder={tmp_path / 'test'}"]) == 0
    image = tmp_path / "parts" / "good" / "0.png"
    tested = load(tmp_path / "test", device="cpu")
    assert tested.predict(image).score == detector.predict(image).score
    assert main(["calibrate", *words, f"--output.folder={tmp_path / 'calibrated'}"]) == 0
    with pytest.warns(UserWarning, match=r"11.1 % is the smallest rate on average"):
        calibrated = load(tmp_path / "calibrated", device="cpu")
    assert repr(calibrated).startswith(f"<Detector: SDP of {tmp_path / 'calibrated'}, category")
    with pytest.warns(UserWarning, match=r"5 % false alarms cannot be had"):
        again = load(tmp_path / "predict", calibration=tmp_path / "calibrated", device="cpu")
    assert calibrated.predict(image).p_value == again.predict(image).p_value


def test_a_method_in_memory_is_a_source(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    method = SDP(tiny_clip, prompts=WORDS, rvs=RVSSettings("mean"), sigma=2.0)
    detector = load(method, category="plank", device="cpu")
    prediction = detector.predict(IMAGE)
    small = torch.from_numpy(resize_image(IMAGE, 32).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = method.score(small, ["plank"])["image_score"].item()
    assert prediction.score == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="option model: a method in memory keeps its settings"):
        load(method, model={"sigma": 3})


def test_a_fit_from_python_keeps_its_preprocessing(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    write_photographs(tmp_path / "parts" / "good", 4, seed=0)
    data = ImageFolder(str(tmp_path / "parts"), normal="all", num_workers=0, batch_size=2)
    method = PaDiM(CNNSettings(weights="random"), image_size=32, num_channels=8)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(method, data)
    detector = load(method, device="cpu")
    assert detector.category == "parts"
    assert detector.preprocessing.data == "ImageFolder"
    trainer.save_checkpoint(tmp_path / "padim.ckpt")
    assert "config-fit.yaml" in message_of(tmp_path / "padim.ckpt")  # the class is not in it


@pytest.mark.slow
def test_precision_is_that_of_the_fit(place: Path, tmp_path: Path) -> None:
    words = [word for word in PADIM if "weights" not in word]
    words += [f"--model.backbone.weights={place / 'weights.pt'}", "--trainer.precision=bf16-true"]
    words += [f"--data.root={place / 'parts'}", f"--output.folder={tmp_path / 'fit'}"]
    assert main(["fit", *words]) == 0
    detector = load(tmp_path / "fit", device="cpu")
    assert detector.preprocessing.precision == "bf16-true"
    assert next(detector.method.backbone.parameters()).dtype == torch.bfloat16
    images = place / "parts" / "good"
    run = tmp_path / "predict"
    words = [f"--ckpt_path={tmp_path / 'fit'}", f"--data.root={images}", "--data.batch_size=5"]
    assert main(["predict", *words, f"--output.folder={run}", "--output.maps=false"]) == 0
    rows = (run / "scores.csv").read_text().splitlines()[1:]
    scores = [prediction.score for prediction in detector.predict(images)]
    assert all(str(score) in row for score, row in zip(scores, rows, strict=True))
    assert torch.get_default_dtype() == torch.float32


def test_loading_makes_a_method_ready() -> None:
    options = {"model.sigma": 3}
    loaded = load_method("sdp", "plank", "cpu", DEMO["backbone"], None, options)
    assert (loaded.category, loaded.is_named, loaded.source) == ("plank", True, "sdp")
    assert not loaded.method.training
    assert loaded.batch_size == 16


def test_options_of_the_command_line() -> None:
    options: dict[str, Any] = {
        "model": {"backbone": {"name": "demo"}, "stages": None},
        "data.words": {"a.b": "c"},
        "trainer": {"enable_progress_bar": False},
    }
    assert option_words(options) == [
        "--model.backbone.name=demo",
        "--model.stages=null",
        '--data.words={"a.b": "c"}',
        "--trainer.enable_progress_bar=false",
    ]
    assert option_words({"data": {"root": Path("a") / "b"}}) == [f"--data.root=a{os.sep}b"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False, raising=False)
    assert find_device(None) == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2: there are only 2 of cuda"):
        find_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="device cuda is not available: give cpu"):
        find_device("cuda")
