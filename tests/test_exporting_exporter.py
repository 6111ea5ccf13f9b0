from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import PADIM, photograph, write_photographs
from PIL import Image

import anomaly_clip.exporting.exporter as exporter
import anomaly_clip.exporting.programs as programs
import anomaly_clip.runtime.detector as runtime
from anomaly_clip.cli import main
from anomaly_clip.detector import Detector, load
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.exporter import Exported, ExportSettings, export_detector, runtimes_of
from anomaly_clip.exporting.parity import Difference
from anomaly_clip.exporting.programs import OLDEST_TORCH
from anomaly_clip.records import Scores

pytest.importorskip("onnxruntime")
pytest.importorskip("torch", minversion=OLDEST_TORCH)
pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Return a calibrated PaDiM on photographs of parts."""
    folder = tmp_path_factory.mktemp("fit")
    write_photographs(folder / "parts" / "good", 24, seed=0)
    words = ["fit", *PADIM, f"--data.root={folder / 'parts'}", "--calibrate=true"]
    assert main([*words, "--calibration.alpha=[0.1]", f"--output.folder={folder / 'run'}"]) == 0
    return load(folder / "run", device="cpu")


@pytest.fixture(scope="module")
def exported(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported") / "detector"
    with pytest.warns(UserWarning, match="the weights are random"):
        assert detector.export(folder) == folder
    return Exported(folder, json.loads((folder / "detector.json").read_text()))


def test_the_folder_holds_everything(detector: Detector, exported: Exported) -> None:
    files = {str(path.relative_to(exported.folder)) for path in exported.folder.rglob("*.*")}
    assert files == {
        *("detector.onnx", "detector.json", "detector.py", "README.md"),
        *("check/0.png", "check/1.png", "check/expected.npz"),
    }
    record = exported.record
    program = (exported.folder / "detector.onnx").read_bytes()
    assert record["program"]["sha256"] == hashlib.sha256(program).hexdigest()
    assert record["program"]["bytes"] == len(program)
    assert (exported.folder / "detector.py").read_bytes() == Path(runtime.__file__).read_bytes()
    assert record["method"] == "PaDiM"
    assert record["category"] == "parts"
    assert record["input"]["shape"] == ["batch", 3, 32, 32]
    assert record["outputs"]["anomaly_map"]["shape"] == [32, 32]
    assert record["weights"]["random"] is True
    assert any("random" in remark for remark in record["remarks"])


def test_levels_are_those_of_the_calibration(detector: Detector, exported: Exported) -> None:
    assert detector.calibration is not None
    [expected] = detector.calibration.categories.values()
    stored = exported.record["calibration"]
    assert stored["n"] == expected.num_images
    assert stored["scores"] == list(expected.scores)
    assert stored["map_threshold"] == expected.map_threshold
    rates = [level["alpha"] for level in stored["levels"]]
    assert rates == [0.1, 0.2, 0.05, 0.02, 0.01, 0.005, 0.001]
    for level in stored["levels"]:
        assert level["threshold"] == expected.level(level["alpha"]).threshold
        assert level["as_asked"] is (level["alpha"] >= 1 / (expected.num_images + 1))
        assert f"these {expected.num_images} calibration images" in level["sentence"]


def test_the_check_holds_the_outputs_of_torch(detector: Detector, exported: Exported) -> None:
    expected = np.load(exported.folder / "check" / "expected.npz")
    for number in range(2):
        image = Image.open(exported.folder / "check" / f"{number}.png")
        assert image.width != image.height  # so that it is resized, and not square
        prediction = detector.predict(image)
        assert prediction.score == pytest.approx(float(expected["image_score"][number]), rel=1e-6)
        assert prediction.image_map is not None
        values = prediction.image_map.values
        assert np.allclose(values, expected["anomaly_map"][number], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_program_scores_batches_of_any_size_as_torch_does(
    detector: Detector, exported: Exported, batch_size: int
) -> None:
    images = [photograph(seed, defect=seed % 3 * 4) for seed in range(batch_size)]
    squares = [
        np.asarray(Image.fromarray(i).resize((32, 32), 3)).transpose(2, 0, 1) for i in images
    ]
    session = runtime.open_session(exported.folder / "detector.onnx", "onnxruntime", None)
    outputs = session.run(np.stack(squares))
    predictions = detector.predict(images)
    scores = [prediction.score for prediction in predictions]
    assert outputs["image_score"].tolist() == pytest.approx(scores, rel=1e-5)


def test_every_runtime_is_compared(exported: Exported) -> None:
    programs_compared = exported.record["parity"]["programs"]
    assert [*programs_compared] == runtimes_of("onnx")
    for stored in programs_compared.values():
        assert 0 <= stored["anomaly_map"] < 1e-5
        assert 0 <= stored["image_score"] < 1e-4
        assert stored["flips"] == 0
        assert stored["version"]


@pytest.mark.slow
def test_nothing_is_left_if_a_program_differs_from_torch(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "compare", lambda *_: Difference(0.0, 2e-5))
    settings = ExportSettings("torch_export")
    with pytest.raises(UserError, match=r"detector\.pt2 in torch differs from torch: anomaly_map"):
        export_detector(detector, tmp_path / "detector", settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_beyond_the_limit_of_onnx_get_a_file_of_their_own(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "PROTOBUF_LIMIT", 1000)
    exported = export_detector(detector, tmp_path / "detector")
    record = exported.record["program"]["external_data"]
    data = (tmp_path / "detector" / "detector.onnx.data").read_bytes()
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert record["bytes"] == len(data) > exported.record["program"]["bytes"]


@pytest.mark.slow
def test_the_export_leaves_the_detector_and_random_numbers_as_they_were(
    detector: Detector, exported: Exported, tmp_path: Path
) -> None:
    image = photograph(3, defect=8)
    before, state = detector.predict(image), torch.get_rng_state()
    export_detector(detector, tmp_path / "detector", ExportSettings("torch_export"))
    assert torch.equal(torch.get_rng_state(), state)
    after = detector.predict(image)
    assert before.score == after.score
    assert np.array_equal(before.map, after.map)


def test_a_detector_of_another_precision_is_exported_by_the_command_line(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = replace(detector.preprocessing, precision="bf16-mixed")
    monkeypatch.setattr(Detector, "preprocessing", reading)
    with pytest.raises(ValueError, match="scores in bf16-mixed, but programs are in float32"):
        detector.export(tmp_path / "detector")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pickle"}, "--format must be one of onnx, torch_export, got pickle"),
        ({"num_images": 1}, "--images must be 2 or more, got 1"),
        ({"opset": 5}, "--opset 5: give a version from 18 to 23"),
        ({"opset": 18, "format": "torch_export"}, "--opset is for --format onnx"),
        ({"include_images": True}, "--include_images needs --data.root"),
    ],
)
def test_mistakes_in_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ExportSettings(), **changes)


def test_an_older_torch_is_named(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(UserError, match=r"needs torch 2\.7 or newer, but this is 2\.6\.0\+cpu"):
        export_detector(detector, tmp_path / "detector")


def test_a_missing_package_is_named(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs the package onnxscript .*anomaly_clip.export"):
        export_detector(detector, tmp_path / "detector")


def test_an_operator_that_onnx_lacks_is_named(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: object, images: torch.Tensor, category: str) -> Scores:
        return Scores(image_score=torch.special.airy_ai(images.float().mean(dim=(1, 2, 3))))

    monkeypatch.setattr(type(detector.method), "score_category", score)
    with pytest.raises(UserError, match=r"cannot be written as ONNX .*airy_ai.*torch_export"):
        export_detector(detector, tmp_path / "detector")
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_depends_on_values_cannot_be_traced(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: object, images: torch.Tensor, category: str) -> Scores:
        values = images.float().mean(dim=(1, 2, 3))
        return Scores(image_score=values if values.max() > 100 else -values)

    monkeypatch.setattr(type(detector.method), "score_category", score)
    with pytest.raises(UserError, match=r"PaDiM cannot be traced as a graph for batches of any"):
        export_detector(detector, tmp_path / "detector")
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_scores_images_by_each_other_is_refused(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(detector.method), "transductive", True)
    with pytest.raises(UserError, match="scores images by each other"):
        export_detector(detector, tmp_path / "detector")


def test_scores_without_a_value_in_torch_are_refused(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: object, images: torch.Tensor, category: str) -> Scores:
        return Scores(image_score=images.float().mean(dim=(1, 2, 3)) * torch.nan)

    monkeypatch.setattr(type(detector.method), "score_category", score)
    with pytest.raises(UserError, match="image_score of some images is NaN or infinite in torch"):
        export_detector(detector, tmp_path / "detector")


@pytest.mark.slow
def test_images_of_a_folder_are_those_nearest_the_threshold(
    detector: Detector, tmp_path: Path
) -> None:
    write_photographs(tmp_path / "photos", 6, seed=50)
    write_photographs(tmp_path / "photos" / "far", 3, seed=70, defect=16)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    settings = ExportSettings(
        "torch_export", images=tmp_path / "photos", num_images=4, include_images=True
    )
    exported = export_detector(detector, tmp_path / "detector", settings)
    assert exported.record["parity"]["source"] == str(tmp_path / "photos")
    assert exported.record["parity"]["images"] == 4
    _, decisions = detector.resolve()
    assert decisions is not None
    [level] = decisions.levels.values()
    predictions = [p for p in detector.predict(tmp_path / "photos") if p.error is None]
    nearest = sorted(predictions, key=lambda p: abs(p.score - level.threshold))[:4]
    scores = exported.record["outputs"]["image_score"]
    assert scores["low"] == pytest.approx(min(p.score for p in nearest), rel=1e-5)
    assert scores["high"] == pytest.approx(max(p.score for p in nearest), rel=1e-5)
    stored = np.asarray(Image.open(tmp_path / "detector" / "check" / "0.png"))
    assert np.array_equal(stored, np.asarray(Image.open(str(nearest[0].path))))


def test_a_folder_without_a_readable_image_is_refused(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    settings = ExportSettings("torch_export", images=tmp_path / "photos")
    with pytest.raises(UserError, match="none of its images can be read"):
        export_detector(detector, tmp_path / "detector", settings)
    write_photographs(tmp_path / "photos", 1, seed=50)
    with pytest.raises(UserError, match="a comparison needs 2 images that can be read"):
        export_detector(detector, tmp_path / "detector", settings)
