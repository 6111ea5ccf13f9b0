"""Checks of ``test`` and ``predict`` as the command line runs them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly_clip.detector import load
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.metric_values import METRICS
from anomaly_clip.testing.images import NAMES, write_images
from anomaly_clip.testing.run_files import image_scores, read_scores
from anomaly_clip.testing.subject import Subject

__all__ = [
    "batch_size_does_not_matter",
    "detector_compares_images_as_predict_does",
    "fit_is_refused_if_there_is_none",
    "grey_files_score_like_rgb_files",
    "predict_scores_each_image",
    "predict_takes_or_refuses_one_image",
    "references_are_recorded",
    "scores_file_has_each_image",
    "scoring_needs_a_fit",
    "small_and_narrow_images_are_scored",
    "test_of_one_image_per_class_works",
    "test_repeats_to_the_bit",
    "test_writes_complete_metrics",
]

TOLERANCE = 1e-3
"""See the tolerance of the checks of ``score``."""
SECTIONS = {"mean", "categories", "intervals", "run"}
RUN = {"method", "weights", "protocol", "checkpoint", "seed", "versions", "environment"}
"""Keys of ``run`` in ``metrics.json``."""


def _tested(subject: Subject) -> Path:
    subject.require(issubclass(subject.kind, EvaluatedModule), "has no test")
    return subject.tested


def test_writes_complete_metrics(subject: Subject) -> None:
    """``test`` ends with 0 and writes each metric of each category, with its origin."""
    content = json.loads((_tested(subject) / "metrics.json").read_text(encoding="utf-8"))
    missing = SECTIONS - set(content)
    assert not missing, f"metrics.json lacks {', '.join(sorted(missing))}"
    missing = RUN - set(content["run"])
    assert not missing, f"run in metrics.json lacks {', '.join(sorted(missing))}"
    assert content["run"]["method"] == subject.kind.__name__, content["run"]["method"]
    for category, metrics in {**content["categories"], "mean": content["mean"]}.items():
        if subject.scores:
            lacking = [name for name in METRICS if name not in metrics]
            assert not lacking, f"{category} lacks {', '.join(lacking)}"
        for name, value in metrics.items():
            assert value is None or 0 <= value <= 1, f"{name} of {category} is {value}"
    values = [value for value in content["mean"].values() if value is not None]
    assert values, "no metric has a value"


def scores_file_has_each_image(subject: Subject) -> None:
    """``scores.csv`` has one row with a finite score for each test image."""
    folder = _tested(subject)
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = read_scores(folder)
    count = sum(content["run"]["protocol"]["images"].values())
    assert len(rows) == count, f"scores.csv has {len(rows)} rows for {count} images"
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths), "scores.csv has an image twice"
    if subject.scores:
        assert np.isfinite(image_scores(folder)).all(), "a score is not finite"


def test_repeats_to_the_bit(subject: Subject) -> None:
    """A second test with the same seed gives the same metrics and scores to the bit."""
    first, second = _tested(subject), subject.succeed("test")
    for key in ("mean", "categories"):
        before, after = (_metrics(folder)[key] for folder in (first, second))
        assert before == after, f"{key} was {before} and is {after}"
    assert read_scores(first) == read_scores(second), "scores.csv differs"


def batch_size_does_not_matter(subject: Subject) -> None:
    """A test one image at a time gives the scores of a test in batches."""
    first = _tested(subject)
    subject.require(subject.scores, "is not a detector")
    second = subject.succeed("test", "--data.batch_size", "1")
    before, after = image_scores(first), image_scores(second)
    apart = np.abs(before - after).max() / max(np.ptp(before), np.finfo(float).tiny)
    assert apart <= TOLERANCE, f"image scores differ by {apart:.2g} of their range"


def predict_scores_each_image(subject: Subject) -> None:
    """``predict`` ends with 0 and gives each image a finite score."""
    subject.require(issubclass(subject.kind, EvaluatedModule), "has no predict")
    folder = subject.succeed("predict")
    assert len(read_scores(folder)) == len(read_scores(subject.tested)), "images are missing"
    if subject.scores:
        assert np.isfinite(image_scores(folder)).all(), "a score is not finite"


def predict_takes_or_refuses_one_image(subject: Subject) -> None:
    """A transductive method scores a folder of one image, or refuses it in one line."""
    subject.require(subject.is_transductive, "is not transductive")
    folder = _other_images(subject, "one")
    source = next((subject.root / NAMES[0] / "test" / "good").iterdir())
    shutil.copy(source, folder / "good")
    options = ["--data.root", str(folder.parent.parent), "--data.categories", f"[{NAMES[0]}]"]
    finished = subject.run("predict", *options)
    if finished.code == 0:
        assert np.isfinite(image_scores(finished.folder)).all(), "the score is not finite"
        return
    assert finished.code == 2, f"predict of one image ends with {finished.code}"
    assert "Traceback" not in finished.stderr, finished.stderr
    assert not (finished.folder / "scores.csv").exists(), "predict has left scores of no image"


def detector_compares_images_as_predict_does(subject: Subject) -> None:
    """``Detector.predict`` of all images of a category has the scores of ``predict``."""
    subject.require(subject.is_transductive, "is not transductive")
    subject.require("class_path" not in subject.data_options, "has a data set of its own")
    options = ["--data.categories", f"[{NAMES[0]}]", "--output.maps", "false"]
    folder = subject.succeed("predict", *options)
    paths = [row["path"] for row in read_scores(folder)]
    with subject.isolated(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* random weights")
        source = subject.checkpoint if subject.must_be_fitted else subject.tested
        detector = load(source, category=NAMES[0], device="cpu")
        predictions = detector.predict(paths)
    before = image_scores(folder)
    after = np.array([prediction.score for prediction in predictions])
    apart = np.abs(before - after).max() / max(np.ptp(before), np.finfo(float).tiny)
    assert apart <= TOLERANCE, f"image scores differ by {apart:.2g} of their range"


def small_and_narrow_images_are_scored(subject: Subject) -> None:
    """Images of one pixel, one row, and a few pixels have finite scores."""
    folder = _other_images(subject, "small")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(1, 1), (1, 40), (40, 1), (3, 5), (300, 20)]):
        array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "good" / f"{number}.png")
    scores = _scores_of(subject, folder)
    assert len(scores) == 5, f"{len(scores)} of 5 images have scores"
    assert np.isfinite(list(scores.values())).all(), f"scores {scores}"


def grey_files_score_like_rgb_files(subject: Subject) -> None:
    """A grey file, and an RGB file of equal channels, have the same score."""
    folder = _other_images(subject, "grey")
    name = NAMES[0]
    source = next((subject.root / name / "test" / "good").iterdir())
    grey = Image.open(source).convert("L")
    grey.save(folder / "good" / "grey.png")
    grey.convert("RGB").save(folder / "good" / "rgb.png")
    scores = _scores_of(subject, folder)
    assert scores["grey.png"] == scores["rgb.png"], scores


def test_of_one_image_per_class_works(subject: Subject) -> None:
    """A test of one normal and one defective image ends with 0."""
    subject.require(subject.scores, "is not a detector")
    subject.require("class_path" not in subject.data_options, "has a data set of its own")
    root = write_images(subject.folder / "one_image", NAMES, num_train=6, num_test=1)
    folder = subject.succeed("test", "--data.root", str(root))
    for category, metrics in _metrics(folder)["categories"].items():
        value = metrics["image_auroc"]
        assert value in (0.0, 0.5, 1.0), f"image_auroc of two images of {category} is {value}"


def scoring_needs_a_fit(subject: Subject) -> None:
    """Without a checkpoint, a method that must be fitted refuses test and predict in one line."""
    subject.require(subject.must_be_fitted, "can be tested without a fit")
    for verb in ("test", "predict"):
        words, folder = subject.words(verb, "--ckpt_path", "null")
        finished = subject.command(words)
        assert finished.code == 2, f"{verb} without a checkpoint ends with {finished.code}"
        assert "--ckpt_path" in finished.last_line, finished.last_line
        assert not folder.exists(), f"{verb} has left {folder.name}"


def fit_is_refused_if_there_is_none(subject: Subject) -> None:
    """A zero-shot method refuses ``fit`` in one line and leaves nothing."""
    subject.require(not subject.can_be_fitted, "can be fitted")
    finished = subject.run("fit")
    assert finished.code == 2, f"fit ends with {finished.code}"
    assert "Traceback" not in finished.stderr, finished.stderr
    assert not finished.folder.exists(), "fit has left a folder"


def references_are_recorded(subject: Subject) -> None:
    """``references.json`` names the reference images, which are no test images."""
    folder = _tested(subject)
    file = folder / "references.json"
    subject.require(file.is_file(), "uses no reference images")
    tested = {row["path"] for row in read_scores(folder)}
    references = json.loads(file.read_text(encoding="utf-8"))
    for category, paths in references.items():
        assert paths, f"{category} has no reference"
        assert not tested & set(paths), f"{category}: a reference is a test image"
        missing = [path for path in paths if not Path(path).is_file()]
        assert not missing or "class_path" in subject.data_options, f"{missing[0]} does not exist"


# -- helpers ---------------------------------------------------------------------------------------


def _metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


def _other_images(subject: Subject, name: str) -> Path:
    """Return the empty test folder of a category with training images, for odd files."""
    subject.require(subject.scores, "is not a detector")
    subject.require("class_path" not in subject.data_options, "has a data set of its own")
    root = subject.folder / name
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(subject.root / NAMES[0] / "train", root / NAMES[0] / "train")
    (root / NAMES[0] / "test" / "good").mkdir(parents=True)
    return root / NAMES[0] / "test"


def _scores_of(subject: Subject, folder: Path) -> dict[str, float]:
    """Predict the images of a folder and return their scores by file name."""
    root = folder.parent.parent
    options = ["--data.root", str(root), "--data.categories", f"[{NAMES[0]}]"]
    run = subject.succeed("predict", *options, "--output.maps", "false")
    rows = read_scores(run)
    return {Path(row["path"]).name: float(row["image_score"]) for row in rows}


for _check in (batch_size_does_not_matter, test_repeats_to_the_bit):
    _check.slow = True  # type: ignore[attr-defined]
