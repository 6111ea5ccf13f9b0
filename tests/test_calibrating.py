"""Tests of the pass over normal images, and of the thresholds from their scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_calibrate import checkpoint, content_of, own_images, photographs

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.file_hashes import pixel_hashes
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.recording.calibrating import ScoredImage, ScoredImages, build_category

DEFAULTS = CalibrationSettings()


def scored(root: Path, with_parts: bool = False) -> list[ScoredImage]:
    """Return images whose score, and highest map value, is their number."""
    files = sorted((root / "good").iterdir())
    return [
        ScoredImage(str(f), float(n), [float(n), 2.0 * n] if with_parts else None, 10.0 + n)
        for n, f in enumerate(files)
    ]


def test_thresholds_of_a_category(tmp_path: Path) -> None:
    data = ImageFolder(str(photographs(tmp_path, 19)), category="nut")
    record = build_category("nut", scored(tmp_path), data, DEFAULTS, ScoredImages())
    assert record.scores == tuple(map(float, range(19)))
    assert record.level(0.05).threshold == 18
    assert record.map_threshold == 28
    assert record.words == "nut"
    assert {*record.images} == {*pixel_hashes((tmp_path / "good").iterdir()).values()}


def test_ranges_are_from_a_third_that_is_not_calibrated_on(tmp_path: Path) -> None:
    data = ImageFolder(str(photographs(tmp_path, 12)))
    images = scored(tmp_path, with_parts=True)
    record = build_category("nut", images, data, DEFAULTS, ScoredImages())
    assert record.num_images == 8
    assert record.part_ranges is not None
    (low, high), second = record.part_ranges
    assert second == (2 * low, 2 * high)
    scaled = {2 * (n - low) / (high - low): n for n in range(12)}
    chosen = {scaled[min(scaled, key=lambda value: abs(value - score))] for score in record.scores}
    assert len(chosen) == 8
    others = {*range(12)} - chosen
    assert (min(others), max(others)) == (low, high)  # not clamped: scores may leave 0..2
    again = build_category("nut", images[::-1], data, DEFAULTS, ScoredImages())
    assert again == record


def test_a_part_that_is_not_scaled_stays_as_it_is(tmp_path: Path) -> None:
    data = ImageFolder(str(photographs(tmp_path, 12)))
    images = scored(tmp_path, with_parts=True)
    passes = ScoredImages(), ScoredImages(scaled_parts=(False, True))
    both, second = (build_category("nut", images, data, DEFAULTS, each) for each in passes)
    assert both.part_ranges is not None
    low, high = both.part_ranges[1]
    assert second.part_ranges == ((0.0, 1.0), (low, high))
    expected = {n + (2 * n - low) / (high - low) for n in range(12)}
    assert {*second.scores} <= {*map(float, expected)}
    assert second.num_images == both.num_images


@pytest.mark.parametrize(("count", "parts"), [(0, False), (2, True)])
def test_too_few_images(tmp_path: Path, count: int, parts: bool) -> None:
    data = ImageFolder(str(photographs(tmp_path, 3)))
    images = scored(tmp_path, parts)[:count]
    with pytest.raises(ValueError, match=f"{count} normal images are too few to calibrate on"):
        build_category("nut", images, data, DEFAULTS, ScoredImages())


@pytest.mark.slow
def test_pixels_by_percentile(tmp_path: Path) -> None:
    fitted = tmp_path / "fitted"
    photographs(fitted / "photos", 12)
    options = own_images(fitted / "photos", fitted / "runs", "--calibrate", "true")
    assert main(["fit", *options]) == 0
    shutil.copytree(fitted / "runs", tmp_path / "runs")
    command = ["calibrate", "--ckpt_path", str(checkpoint(tmp_path))]
    assert main([*command, "--calibration.map_percentile", "90"]) == 0
    threshold = content_of(tmp_path)["calibration"]["categories"]["photos"]["map_threshold"]
    images = content_of(fitted)["calibration"]["categories"]["photos"]["images"]
    scored = tmp_path / "scores"
    command = ["predict", "--ckpt_path", str(checkpoint(fitted)), "--output.raw_maps", "true"]
    command += ["--data.root", str(fitted / "photos"), "--output.folder", str(scored)]
    assert main([*command, "--output.page", "false", "--output.maps", "false"]) == 0
    maps = [
        np.load(scored / "raw_maps" / "photos" / "good" / f"{path.stem}.npy")
        for path, key in pixel_hashes((fitted / "photos" / "good").iterdir()).items()
        if key in images
    ]
    above = float((np.stack(maps).astype(np.float32) > threshold).mean())
    assert above == pytest.approx(0.1, abs=0.003)  # the maps are saved in half precision


def test_percentile_is_of_the_images_that_were_scored() -> None:
    values = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    listed = [SimpleNamespace(category="nut")] * 9  # four of which were not scored
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(samples=lambda split: listed))
    scored_images = ScoredImages(map_percentile=90)
    for image in values:
        scored_images._keep_pixels(trainer, "nut", image)
    threshold = scored_images.percentile("nut")
    assert (values > threshold).sum() == int(0.1 * values.size)
