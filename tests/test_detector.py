"""Detectors from Python score and decide as the command line does."""

from __future__ import annotations

import csv
import json
import logging
import pickle
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from calibrations import PADIM, conditions_of, read_csv, write_photographs
from helpers import save_picture
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.detector import Detector, load
from anomaly_clip.results.map_store import resize_map

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights.*")

DEMO: dict[str, Any] = {"backbone": {"pretrained": "demo"}, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a fit of PaDiM in ``fit`` and odd images in ``new``."""
    folder = tmp_path_factory.mktemp("detector")
    write_photographs(folder / "parts" / "good", 6, seed=0)
    words = [*PADIM, f"--data.root={folder / 'parts'}", f"--output.folder={folder / 'fit'}"]
    assert main(["fit", *words]) == 0
    odd_images(folder / "new")
    return folder


def odd_images(folder: Path) -> None:
    """Write images of several sizes and formats, and one that cannot be read."""
    rng = np.random.default_rng(1)
    for number, size in enumerate(((31, 77), (120, 33), (32, 32))):
        save_picture(folder / f"{number}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned.save(folder / "turned.jpg", exif=exif)
    save_picture(folder / "grey.png", rng.integers(0, 256, (40, 44), dtype=np.uint8))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n123")


def command_line(words: Sequence[str], run: Path) -> dict[str, dict[str, str]]:
    """Run predict and return its scores by file name; its raw maps are in the run's folder."""
    options = ["--output.raw_maps=true", "--output.page=false", "--output.maps=false"]
    assert main(["predict", *words, *options, f"--output.folder={run}"]) in (0, 1)
    return {Path(row["path"]).name: row for row in read_csv(run / "scores.csv")}


def assert_equal_scores(
    detector: Detector, images: Path, rows: dict[str, dict[str, str]], **options: Any
) -> None:
    predictions = detector.predict(images, **options)
    assert [Path(p.path).name for p in predictions] == sorted(rows)
    for prediction in predictions:
        row = rows[Path(prediction.path).name]
        if row["image_score"]:
            assert prediction.score == float(row["image_score"])
            assert all(value == float(row[name]) for name, value in prediction.parts.items())
        else:
            assert np.isnan(prediction.score)
            assert prediction.error == row["error"]


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_of_a_fitted_method_are_those_of_predict(
    place: Path, tmp_path: Path, batch: int
) -> None:
    words = [f"--ckpt_path={place / 'fit'}", f"--data.root={place / 'new'}"]
    rows = command_line([*words, f"--data.batch_size={batch}"], tmp_path / "run")
    detector = load(place / "fit", device="cpu")
    assert_equal_scores(detector, place / "new", rows, batch_size=batch)
    if batch == 1:
        single = detector.predict(place / "new" / "turned.jpg")
        assert single.score == float(rows["turned.jpg"]["image_score"])
        assert single.map.shape == (60, 40)
        # Raw maps are stored with 16 bits at the size of the method.
        small = np.load(next((tmp_path / "run" / "raw_maps").rglob("turned.npy")))
        full = resize_map(small.astype(np.float32), (60, 40))
        assert np.abs(single.map - full).max() < 2e-3 * np.abs(full).max()


@pytest.mark.parametrize(
    ("configuration", "model"),
    [("sdp", {"sigma": 4.0, "rvs": {"method": "mean"}}), ("winclip", {"scales": [2]})],
)
def test_scores_of_a_zero_shot_method_are_those_of_predict(
    place: Path, tmp_path: Path, configuration: str, model: dict[str, Any]
) -> None:
    words = [f"--config={configuration}", "--data=ImageFolder", "--data.category=brass washer"]
    words += [f"--data.root={place / 'new'}", "--data.num_workers=0", "--data.batch_size=3"]
    words += ["--model.backbone.pretrained=demo", "--trainer.accelerator=cpu"]
    words += [f"--model.{k}={json.dumps(v)}" for k, v in model.items() if not isinstance(v, dict)]
    words += ["--model.rvs.method=mean"] if "rvs" in model else []
    rows = command_line(words, tmp_path / "run")
    detector = load(configuration, category="brass washer", model=model, **DEMO)
    assert detector.category == "brass washer"
    assert_equal_scores(detector, place / "new", rows, batch_size=3)
    assert not list(tmp_path.glob("runs")), "loading has created a folder of a run"


@pytest.mark.slow
def test_references_are_those_of_predict(place: Path, tmp_path: Path) -> None:
    parts = place / "parts"
    words = ["--config=winclip_4shot", "--data=ImageFolder", "--data.category=plank"]
    words += [f"--data.root={parts}", "--data.num_workers=0", "--data.shots=2"]
    words += ["--model.backbone.pretrained=demo", "--trainer.accelerator=cpu"]
    rows = command_line(words, tmp_path / "run")
    options = {"references": parts, "data": {"shots": 2}, "category": "plank", **DEMO}
    detector = load("winclip_4shot", **options)
    files = json.loads((tmp_path / "run" / "references.json").read_text())
    assert detector.method.reference_paths == files
    assert len(files["plank"]) == 2
    assert_equal_scores(detector, parts / "good", rows, batch_size=8)
    with pytest.raises(ValueError, match="the reference images are of plank: load a detector for"):
        detector.predict(parts / "good" / "0.png", category="screw")
    with pytest.raises(ValueError, match=r"references of one category: name it, such as category="):
        load("winclip_4shot", references=parts, **DEMO)
    with pytest.raises(ValueError, match="winclip_4shot compares images with 4 reference images"):
        load("winclip_4shot", category="plank", **DEMO)


def test_images_in_memory_score_as_their_files(place: Path) -> None:
    detector = load(place / "fit", device="cpu")
    files = [place / "new" / name for name in ("0.png", "turned.jpg", "grey.png")]
    expected = [detector.predict(file) for file in files]
    with Image.open(files[1]) as turned:
        pixels: list[Any] = [np.asarray(Image.open(file)) for file in files]
        pixels[1] = turned
        predictions = detector.predict(pixels, batch_size=1)
    for prediction, same in zip(predictions, expected, strict=True):
        assert prediction.score == same.score
        assert prediction.map is not None
        assert np.array_equal(prediction.map, same.map)
        assert prediction.path is None
    backwards = np.asarray(Image.open(files[0]))[::-1, :, ::-1]  # not contiguous
    assert detector.predict(backwards).score == detector.predict(backwards.copy()).score


def test_one_of_several_images_that_cannot_be_read_has_an_error(place: Path) -> None:
    detector = load(place / "fit", device="cpu")
    files: list[Any] = [
        place / "new" / "broken.png",
        str(place / "new" / "0.png"),
        place / "nowhere.png",
    ]
    broken, good, missing = detector.predict(files)
    assert good.error is None
    assert good.path == files[1]
    assert broken.error is not None
    assert broken.error.startswith("the image cannot be decoded")
    assert missing.error is not None
    assert missing.error.startswith("there is no such file")
    assert broken.map is broken.mask is broken.decision is broken.p_value is None
    with pytest.raises(ValueError, match=r"broken.png: the image cannot be decoded"):
        detector.predict(files[0])
    with pytest.raises(FileNotFoundError, match=r"nowhere.png: there is no such file"):
        detector.predict(files[2])
    assert detector.predict([]) == []
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        detector.predict(files, batch_size=0)


def test_images_of_16_bits_are_read_as_by_predict(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "camera"
    folder.mkdir()
    for number in range(2):
        values = rng.integers(0, 2 ** (11 + number), (40, 40, 3), dtype=np.uint16)
        cv2.imwrite(str(folder / f"{number}.png"), values)
    words = [f"--ckpt_path={place / 'fit'}", f"--data.root={folder}"]
    rows = command_line(words, tmp_path / "run")
    detector = load(place / "fit", device="cpu")
    with pytest.warns(UserWarning, match=r"2 images with 16 bits .*: 12 are used \(chosen by"):
        assert_equal_scores(detector, folder, rows)
    with pytest.warns(UserWarning, match="1 image with 16 bits per channel: 12 are used"):
        assert detector.predict(folder / "1.png").score == pytest.approx(
            float(rows["1.png"]["image_score"]), rel=1e-5
        )


def test_a_fit_keeps_the_bit_depth_of_its_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        values = rng.integers(0, 1000, (40, 40), dtype=np.uint16)
        file = tmp_path / "parts" / "good" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), values)
    words = [*PADIM, f"--data.root={tmp_path / 'parts'}", f"--output.folder={tmp_path / 'fit'}"]
    assert main(["fit", *words]) == 0
    words = [f"--ckpt_path={tmp_path / 'fit'}", f"--data.root={tmp_path / 'parts'}"]
    rows = command_line(words, tmp_path / "run")
    detector = load(tmp_path / "fit", device="cpu")
    assert detector.preprocessing.bit_depth == 10
    assert_equal_scores(detector, tmp_path / "parts", rows)


def test_a_crop_is_that_of_the_fit_and_maps_tell_what_it_leaves_out(tmp_path: Path) -> None:
    write_photographs(tmp_path / "parts" / "good", 5, seed=0)  # 56 x 40 pixels
    words = [*PADIM, "--data.resize={rule: shorter_crop, size: 40}"]
    words += [f"--data.root={tmp_path / 'parts'}", f"--output.folder={tmp_path / 'fit'}"]
    assert main(["fit", *words]) == 0
    words = [f"--ckpt_path={tmp_path / 'fit'}", f"--data.root={tmp_path / 'parts'}"]
    rows = command_line(words, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"sees only the centre .* shorter_crop, 40 to 32 pixels"):
        detector = load(tmp_path / "fit", device="cpu")
    assert_equal_scores(detector, tmp_path / "parts", rows)
    prediction = detector.predict(tmp_path / "parts" / "good" / "0.png")
    seen = ~np.isnan(prediction.map)
    assert seen.shape == (40, 56)
    assert seen.sum() == seen[4:36, 12:44].sum() == 32 * 32
    assert prediction.overlay().size == (56, 40)


# -- decisions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(place: Path) -> Calibration:
    """Return a calibration of 20 made-up scores of the fitted method."""
    words = ["predict", f"--ckpt_path={place / 'fit'}", f"--data.root={place / 'parts'}"]
    conditions = conditions_of(words, place, "PaDiM")
    scores = tuple(float(number) for number in range(20))
    record = CategoryCalibration(scores, map_threshold=25.0)
    return Calibration("PaDiM", {"parts": record}, conditions)


def test_decisions_are_those_of_predict(
    place: Path, tmp_path: Path, calibration: Calibration
) -> None:
    file = tmp_path / "calibration.json"
    predictions = load(place / "fit", device="cpu").predict(place / "new")
    scores = sorted(p.score for p in predictions if p.error is None)
    middle = (*np.linspace(0, scores[2], 19), scores[2] + 0.01)
    record = replace(calibration.categories["parts"], scores=middle)
    replace(calibration, categories={"parts": record}).write(file)
    words = [f"--ckpt_path={place / 'fit'}", f"--data.root={place / 'new'}"]
    words += ["--data.category=parts", f"--calibration.file={file}"]
    rows = command_line(words, tmp_path / "run")
    predictions = load(place / "fit", calibration=file, device="cpu").predict(place / "new")
    assert {p.decision for p in predictions} == {"normal", "anomalous", None}
    for prediction in predictions:
        row = rows[Path(prediction.path).name]
        assert (prediction.decision or "") == row["decision"]
        assert str(prediction.p_value or "") == row["p_value"]


def test_another_rate_decides_on_request(place: Path, calibration: Calibration) -> None:
    image = place / "new" / "0.png"
    score = load(place / "fit", device="cpu").predict(image).score
    record = CategoryCalibration((*(0.0,) * 18, score, score + 1))
    detector = load(
        place / "fit",
        calibration=replace(calibration, categories={"parts": record}),
        alpha=0.15,
        device="cpu",
    )
    assert detector.predict(image).decision == "anomalous"
    strict = detector.predict(image, alpha=0.05)
    assert (strict.decision, strict.p_value) == ("normal", pytest.approx(3 / 21))
    assert strict.mask is None
    with pytest.warns(UserWarning, match=r"1 % false alarms cannot be had: 4.8 % is the smallest"):
        detector.predict(image, alpha=0.01)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        detector.predict(image, alpha=0.01)
    assert detector.guarantee().startswith("With these 20 calibration images, at most 15 %")
    with pytest.raises(ValueError, match="alpha"):
        detector.predict(image, alpha=1.5)


def test_marked_pixels_are_above_the_map_threshold(place: Path, calibration: Calibration) -> None:
    detector = load(place / "fit", calibration=calibration.as_dict(), device="cpu")
    prediction = detector.predict(place / "new" / "0.png")
    assert prediction.map_threshold == 25.0
    assert np.array_equal(prediction.mask, prediction.map > 25.0)
    assert repr(detector).endswith("category 'parts', calibrated, alpha 0.05, cpu>")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "PatchCore"}, "is a calibration of PatchCore, but the method is PaDiM"),
        ({"resize": "Resize(rule='square', size=None, filter='nearest')"}, "resize is Resize"),
        ({"fitted_sha256": "0"}, "the fitted weights differ: calibrate again"),
        ({"precision": "bf16-mixed"}, "precision is 32-true, but .* was made with bf16-mixed"),
        ({"part_ranges": ((0.0, 1.0),)}, "the ranges of 1 score parts for parts, but PaDiM has 0"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    place: Path, calibration: Calibration, changed: dict[str, Any], message: str
) -> None:
    method = changed.pop("method", "PaDiM")
    ranges = changed.pop("part_ranges", None)
    record = replace(calibration.categories["parts"], part_ranges=ranges)
    conditions = {**calibration.conditions, **changed}
    other = Calibration(method, {"parts": record}, conditions)
    with pytest.raises(ValueError, match=message):
        load(place / "fit", calibration=other, device="cpu")


def test_a_missing_calibration_or_category_is_refused(
    place: Path, tmp_path: Path, calibration: Calibration
) -> None:
    with pytest.raises(ValueError, match=r"there is no calibration.json: give that file"):
        load(place / "fit", calibration=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="no calibration, or a damaged one"):
        load(place / "fit", calibration={}, device="cpu")
    with pytest.raises(ValueError, match="is not calibrated, so that nothing is decided: give a"):
        load(place / "fit", alpha=0.1, device="cpu")
    with pytest.raises(ValueError, match="the calibration has no category 'screw', only parts"):
        load(place / "fit", category="screw", calibration=calibration, device="cpu")
    detector = load(place / "fit", device="cpu")
    with pytest.raises(ValueError, match="is not calibrated: give a calibration"):
        detector.guarantee()
    with pytest.raises(ValueError, match="is not calibrated, so that nothing is decided"):
        detector.predict(place / "new" / "0.png", alpha=0.1)


def test_images_of_another_bit_depth_than_calibrated_are_refused(
    place: Path, tmp_path: Path, calibration: Calibration
) -> None:
    detector = load(place / "fit", calibration=calibration, device="cpu")
    file = tmp_path / "deep.png"
    cv2.imwrite(str(file), np.full((40, 40), 4000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"deep.png has 12 bits per channel, but .* had 8"):
        detector.predict([place / "new" / "0.png", file])


def test_the_score_of_a_calibrated_sdp_is_the_scaled_sum_of_its_parts(place: Path) -> None:
    words = ["predict", "--config=sdp", "--data=ImageFolder", "--data.category=plank"]
    words += [f"--data.root={place / 'parts'}", "--data.num_workers=0"]
    words += ["--model.backbone.pretrained=demo", "--trainer.accelerator=cpu"]
    ranges = ((0.1, 0.5), (0.0, 0.01))
    conditions = conditions_of(words, place, "SDP", part_ranges=ranges)
    record = CategoryCalibration(tuple(np.linspace(-1, 1, 20)), part_ranges=ranges)
    calibration = Calibration("SDP", {"plank": record}, conditions)
    detector = load("sdp", category="plank", calibration=calibration, **DEMO)
    prediction = detector.predict(place / "new" / "0.png")
    expected = (prediction.parts["r0"] - 0.1) / 0.4 + prediction.parts["r1"] / 0.01
    assert prediction.score == pytest.approx(expected)
    assert prediction.p_value == (1 + sum(s >= prediction.score for s in record.scores)) / 21


# -- threads and the process -----------------------------------------------------------------------


def test_threads_get_the_same_results(place: Path) -> None:
    """Categories of different threads are encoded while others score."""
    detector = load("sdp", **DEMO)
    names = ["plank", "screw", "brass washer", "leather"] * 3
    files = sorted((place / "new").glob("[0-9].png")) * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda f, n: detector.predict(f, category=n).score, files, names))
    again = load("sdp", **DEMO)
    alone = [again.predict(f, category=n).score for f, n in zip(files, names, strict=True)]
    assert together == alone
    assert len(set(alone)) == len(set(zip(files, names, strict=True)))


def test_a_prediction_does_not_keep_the_maps_of_its_batch(place: Path) -> None:
    first, *_ = load(place / "fit", device="cpu").predict([place / "new" / "0.png"] * 3)
    assert first.image_map is not None
    assert first.image_map.values.base is None


def test_threads_can_load_at_once(place: Path) -> None:
    """Backbones are traced by torch.fx, which works in one thread only."""
    with ThreadPoolExecutor(3) as pool:
        detectors = list(pool.map(lambda _: load(place / "fit", device="cpu"), range(3)))
    file = place / "new" / "0.png"
    assert len({detector.predict(file).score for detector in detectors}) == 1


def test_a_detector_is_not_sent_to_other_processes(place: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied .*: call anomaly_clip.load with .*fit"):
        pickle.dumps(load(place / "fit", device="cpu"))


def test_loading_and_predicting_change_nothing_in_the_process(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def state() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            logging.getLogger("lightning.pytorch").level,
            list(warnings.filters),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = state()
    for detector in (load(place / "fit", device="cpu"), load("sdp", category="plank", **DEMO)):
        detector.predict(place / "new" / "0.png")
        assert not detector.method.training
    assert state() == before
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_results_can_be_written_as_a_table(place: Path, tmp_path: Path) -> None:
    predictions = load(place / "fit", device="cpu").predict(place / "new")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([p.path, p.score, p.decision] for p in predictions)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == len(predictions)
