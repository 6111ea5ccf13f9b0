"""APRIL-GAN with references in all verbs: their decisions agree, and options are checked."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_CLIP, save_picture, write_mvtec

import anomaly_clip
from anomaly_clip.cli import main
from anomaly_clip.runtime.detector import Detector as Exported

CATEGORY = "bottle"
SHOTS = 2


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


class Place:
    """A data set, an auxiliary one, and the command lines of runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clip = folder / "clip.json"
        self.clip.write_text(json.dumps(TINY_CLIP))
        self.auxiliary = write_mvtec(folder / "auxiliary")
        self.root = folder / "data"
        for number in range(14):
            save_picture(self.root / CATEGORY / f"train/good/{number:03d}.png", noise(number))
        for number in range(4):
            kind = "good" if number < 2 else "scratch"
            save_picture(self.root / CATEGORY / f"test/{kind}/{number}.png", noise(100 + number))
            if number >= 2:
                mask = np.zeros((40, 48), np.uint8)
                mask[8:20, 10:30] = 255
                save_picture(self.root / CATEGORY / f"ground_truth/scratch/{number}_mask.png", mask)

    def words(self, verb: str, name: str, *more: str) -> list[str]:
        """Return a command line; its run is in the folder of the name."""
        words = [verb, "--data", "MVTecAD", f"--data.root={self.root}", "--data.num_workers=0"]
        words += ["--trainer.accelerator=cpu", f"--output.folder={self.folder / name}"]
        return [*words, "--output.page=false", *more]

    @property
    def model(self) -> list[str]:
        """Options of the method and of its auxiliary data set."""
        words = ["--model=APRILGAN", f"--model.backbone.name={self.clip}"]
        words += ["--model.backbone.pretrained=random", '--model.prompts.templates=["a {}."]']
        words += ["--model.lr=0.01", "--data.auxiliary=MVTecAD"]
        return [*words, f"--data.auxiliary.root={self.auxiliary}"]

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        """Return the rows of ``scores.csv`` of a run by the stem of the image."""
        with (self.folder / name / "scores.csv").open(newline="") as file:
            return {Path(row["path"]).stem: row for row in csv.DictReader(file)}

    def record(self, name: str) -> Any:
        return json.loads((self.folder / name / "metrics.json").read_text())["run"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Fit on the auxiliary data set, with the references of the tests in the same options."""
    place = Place(tmp_path_factory.mktemp("april_gan"))
    words = [*place.model, "--trainer.max_epochs=1", f"--data.shots={SHOTS}"]
    assert main(place.words("fit", "fit", *words)) == 0
    return place


@pytest.fixture(scope="module")
def calibrated(place: Place) -> Place:
    shutil.copytree(place.folder / "fit", place.folder / "fitted")
    more = ["--ckpt_path", str(place.folder / "fitted"), f"--data.shots={SHOTS}"]
    assert main(place.words("calibrate", "calibrate", *more)) == 0
    for verb in ("test", "predict"):
        assert main(place.words(verb, verb, *more)) == 0
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*random", "ignore:.*cannot be had")
def test_decisions_of_all_verbs_agree(calibrated: Place, tmp_path: Path) -> None:
    place = calibrated
    tested, predicted = place.rows("test"), place.rows("predict")
    assert tested.keys() == predicted.keys() == {"0", "1", "2", "3"}
    references = json.loads((place.folder / "test" / "references.json").read_text())[CATEGORY]
    assert len(references) == SHOTS
    for path in references:
        save_picture(tmp_path / "references" / Path(path).name, noise(int(Path(path).stem)))
    [file] = place.folder.glob("*/checkpoints/calibration.json")
    calibration = json.loads(file.read_text())
    record = calibration["categories"][CATEGORY]
    assert record["part_ranges"][0] == [0.0, 1.0]
    low, high = record["part_ranges"][1]
    fitted = str(place.folder / "fitted")
    options: dict[str, Any] = {"category": CATEGORY, "device": "cpu"}
    detector = anomaly_clip.load(fitted, references=tmp_path / "references", **options)
    files = sorted(place.root.glob(f"{CATEGORY}/test/*/*.png"))
    predictions = {Path(str(p.path)).stem: p for p in detector.predict(files)}
    for name, prediction in predictions.items():
        row = predicted[name]
        score = float(row["text"]) + (float(row["map"]) - low) / (high - low)
        assert prediction.score == pytest.approx(score, abs=1e-4)
        for rows in (tested, predicted):
            assert float(rows[name]["p_value"]) == pytest.approx(prediction.p_value)
            assert rows[name]["decision"] == prediction.decision
    assert len({prediction.p_value for prediction in predictions.values()}) > 1
    words = ["export", "--ckpt_path", fitted, "--data.category", CATEGORY]
    words += ["--references", str(tmp_path / "references"), "--folder", str(tmp_path / "out")]
    assert main([*words, "--format", "torch_export"]) == 0
    exported = Exported(tmp_path / "out")
    for result in exported.predict([str(file) for file in files]):
        expected = predictions[Path(result.path).stem]
        assert result.score == pytest.approx(expected.score, abs=1e-4)
        assert result.p_value == pytest.approx(expected.p_value)
        assert result.decision == expected.decision


@pytest.mark.slow
def test_what_a_test_with_references_records(place: Place) -> None:
    words = place.words("test", "recorded", "--ckpt_path", str(place.folder / "fit"))
    assert main([*words, "--data.shots=1", "--data.seed=3"]) == 0
    protocol = place.record("recorded")["protocol"]
    assert protocol["shots"] == 1
    assert protocol["auxiliary"] == "MVTecAD"
    assert protocol["overlap"] == 0
    assert protocol["fitted"] is True
    references = json.loads((place.folder / "recorded" / "references.json").read_text())
    assert [len(paths) for paths in references.values()] == [1]
    rows = place.rows("recorded").values()
    parts = np.array([[float(row["text"]), float(row["map"])] for row in rows])
    low, high = parts[:, 1].min(), parts[:, 1].max()
    expected = parts[:, 0] + (parts[:, 1] - low) / (high - low)
    np.testing.assert_allclose([float(row["image_score"]) for row in rows], expected, atol=1e-5)


@pytest.mark.slow
def test_a_test_without_references_is_zero_shot(place: Place) -> None:
    more = ["--ckpt_path", str(place.folder / "fit"), "--data.shots=null"]
    assert main(place.words("test", "zero", *more)) == 0
    assert not (place.folder / "zero" / "references.json").exists()
    [row, *_] = place.rows("zero").values()
    assert "text" not in row
    assert place.record("zero")["protocol"]["shots"] is None


@pytest.mark.slow
def test_validation_on_auxiliary_images_uses_no_references(place: Place) -> None:
    words = [*place.model, "--trainer.max_epochs=1", "--data.shots=1"]
    words += ["--data.val_split=auxiliary", "--data.val_share=0.5"]
    assert main(place.words("fit", "validated", *words)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.shots=20"], "category 'bottle' has 14 normal training images: lower data.shots"),
        (["--data.auxiliary.shots=1"], "leave out data.auxiliary.auxiliary, data.auxiliary.shots"),
        (["--data.shots=2", "--data.fraction=0.5"], "exclude each other"),
    ],
)
def test_references_that_cannot_be_had(
    place: Place, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.words("test", "refused", "--ckpt_path", str(place.folder / "fit"), *more)
    assert main(words) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_references_must_not_be_test_images(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place.root, tmp_path / "data")
    for file in sorted((tmp_path / "data" / CATEGORY / "train" / "good").iterdir()):
        shutil.copy(file, tmp_path / "data" / CATEGORY / "test" / "good" / f"x{file.name}")
    words = place.words("test", "copies", "--ckpt_path", str(place.folder / "fit"))
    words += [f"--data.root={tmp_path / 'data'}", "--data.shots=2"]
    assert main(words) == 2
    assert "2 test images are among the reference images" in capsys.readouterr().err
    assert main([*words, "--data.allow_overlap=true"]) == 0
    assert place.record("copies")["protocol"]["overlap"] == 2
