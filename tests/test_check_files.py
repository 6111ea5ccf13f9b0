from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.data import Demo, ImageFolder
from anomaly_clip.data.check_files import Problem, inspect_samples, printable, short_path
from anomaly_clip.data.dataset import Sample


@pytest.fixture
def data(tmp_path: Path) -> ImageFolder:
    return ImageFolder(str(tmp_path), "plank")


def test_a_file_is_described_by_its_content(data: ImageFolder) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 24, 3), dtype=np.uint8)
    original, copy = (save_picture(data.root / f"{name}.png", array) for name in "ab")
    Image.fromarray(array[..., 0]).save(data.root / "c.png")
    samples = [Sample(path, "plank", False) for path in (original, copy, data.root / "c.png")]
    first, same, grey = inspect_samples(data, [(s, "test") for s in samples], 2, thumbnails=True)
    assert (first.size, first.mode, first.split, first.problems) == ((24, 40), "RGB", "test", ())
    assert first.digest == same.digest != grey.digest
    assert grey.mode == "L"
    assert first.thumbnail is not None
    assert grey.thumbnail is not None
    # Thumbnails have mean 0 and norm 1, so their dot product is numpy's correlation.
    small = [np.asarray(Image.open(s.image).convert("RGB").resize((16, 16), 3)) for s in samples]
    flat = [values.astype(float).mean(axis=2).ravel() for values in small]
    expected = np.corrcoef(flat[0], flat[2])[0, 1]
    assert float(first.thumbnail @ grey.thumbnail) == pytest.approx(expected, abs=1e-5)
    [without] = inspect_samples(data, [(samples[0], "test")])
    assert without.thumbnail is None


def test_problems_of_files_do_not_stop_the_check(data: ImageFolder) -> None:
    good = save_picture(data.root / "good.png")
    (data.root / "broken.png").write_bytes(b"not an image")
    lying = save_picture(data.root / "x.png").rename(data.root / "lying.jpg")
    mask = save_picture(data.root / "mask.png", np.zeros((40, 38), np.uint8))
    listed = [
        Sample(data.root / "broken.png", "plank", False),
        Sample(data.root / "none.png", "plank", False),
        Sample(lying, "plank", False),
        Sample(good, "plank", True, mask),
        Sample(good, "plank", True, data.root / "no_mask.png"),
    ]
    inspected = inspect_samples(data, [(sample, "test") for sample in listed], 1)
    assert [files.sample for files in inspected] == listed
    assert [[(p.kind, p.path) for p in files.problems] for files in inspected] == [
        [("unreadable", "broken.png")],
        [("missing", "none.png")],
        [("extension", "lying.jpg")],
        [("mask size", "mask.png"), ("mask empty", "mask.png")],
        [("mask missing", "good.png")],
    ]
    assert [files.misfit for files in inspected] == [0, 0, 0, 2, 0]
    assert inspected[1].problems == (Problem("missing", "none.png", "there is no such file"),)


def test_generated_images_are_described_too() -> None:
    data = Demo(categories=["pink pill"], num_train=2, picture_size=64)
    first, second = inspect_samples(data, [(s, "train") for s in data.samples("train")])
    assert (first.size, first.mode, first.problems) == ((64, 64), "RGB", ())
    assert first.digest != second.digest


def test_paths_are_relative_to_the_data_set_and_printable(data: ImageFolder) -> None:
    assert short_path(data, data.root / "a" / "b\n.png") == "a/b\\n.png"
    assert short_path(data, data.root) == str(data.root)
    assert short_path(data, Path("/elsewhere/a.png")) == "/elsewhere/a.png"
    assert printable("ä\x1b[31m") == "ä\\x1b[31m"
