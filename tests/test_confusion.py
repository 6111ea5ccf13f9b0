from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.drawing.confusion import (
    DARKEST,
    LARGEST,
    SMALLEST,
    draw_confusion,
    write_confusion,
)


def test_classes_as_a_table_and_an_image(tmp_path: Path) -> None:
    counts = np.array([[3, 0], [1, 1]])
    file = write_confusion(tmp_path, counts, ["good", "Center"], "a probe", "a warning")
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == ["true,good,Center", "good,3,0", "Center,1,1"]
    with Image.open(file) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    # A cell's colour shows its fraction of the counts in its row: 1 in one cell, 1/2 in two.
    pixels = Counter(map(tuple, sheet.reshape(-1, 3).tolist()))
    half = tuple(round((255 + dark) / 2) for dark in DARKEST)
    for colour, cells in ((DARKEST, 1), (half, 2)):
        assert 0.9 * cells < pixels[colour] / LARGEST**2 <= cells
    red = (sheet[..., 0] > 150) & (sheet[..., 1] < 60) & (sheet[..., 2] < 60)
    assert red.any()


def test_patterns_as_a_table_and_an_image(tmp_path: Path) -> None:
    counts = np.array([[[5, 1], [2, 3]], [[8, 0], [3, 0]]])
    write_confusion(tmp_path, counts, ["Center", "Loc"], "a probe", None)
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == [
        "pattern,true_positive,false_positive,false_negative,true_negative",
        "Center,3,1,2,5",
        "Loc,0,0,3,8",
    ]
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width > 4 * LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 38, 120])
def test_images_of_few_and_many_classes(count: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"class number {number}" for number in range(count)]
    sheet = draw_confusion(rng.integers(0, 100000, (count, count)), names, "a probe")
    assert sheet.width > count * SMALLEST
    assert sheet.getpixel((0, sheet.height - 1)) == (255, 255, 255)


def test_a_class_that_does_not_occur_is_an_empty_row() -> None:
    sheet = np.asarray(draw_confusion(np.array([[0, 0], [0, 4]]), ["a", "b"], "a probe"))
    assert (sheet == DARKEST).all(axis=2).sum() <= LARGEST**2
