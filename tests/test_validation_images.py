from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_clip.recording import validation_images as watched
from anomaly_clip.recording.validation_images import ValidationImages
from anomaly_clip.records import Batch, Scores


def batch_of(category: str, count: int) -> tuple[Scores, Batch]:
    """Return images of one category, every second one anomalous."""
    maps = torch.rand(count, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        image=torch.zeros(count, 3, 16, 16, dtype=torch.uint8),
        label=torch.arange(count) % 2 == 1,
        category=[category] * count,
        path=[f"{number}" for number in range(count)],
        index=torch.arange(count),
        mask=torch.zeros(count, 16, 16, dtype=torch.bool),
    )
    return Scores(image_score=maps.amax((1, 2)), anomaly_map=maps), batch


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ("a", ["a normal", "a normal", "a anomalous", "a anomalous"]),
        # Of more than four images, four evenly spaced ones are drawn, from first to last.
        ("abcde", ["a normal", "b anomalous", "d normal", "e anomalous"]),
    ],
)
def test_images_are_from_many_categories(
    categories: str,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []

    def draw(*arguments: object) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        drawn.append(str(arguments[4]))
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(watched, "draw_panels", draw)
    images = ValidationImages(4)
    for category in categories:
        images.add(*batch_of(category, 8), len(categories))
    images.draw(tmp_path / "step.png", None)
    assert [" ".join(caption.split()[:2]) for caption in drawn] == expected
    images.draw(tmp_path / "again.png", None)  # the images were discarded
    assert [file.name for file in tmp_path.iterdir()] == ["step.png"]


def test_the_file_is_an_image(tmp_path: Path) -> None:
    images = ValidationImages(2)
    images.add(*batch_of("wood", 4), 1)
    images.draw(tmp_path / "validation" / "step.png", "a warning")
    with Image.open(tmp_path / "validation" / "step.png") as image:
        assert image.height > 2 * 16


def test_no_image_is_drawn_if_none_is_requested(tmp_path: Path) -> None:
    images = ValidationImages(0)
    images.add(*batch_of("wood", 4), 1)
    images.draw(tmp_path / "step.png", None)
    assert not list(tmp_path.iterdir())


def test_a_single_image_is_drawn_if_one_is_requested(tmp_path: Path) -> None:
    heights = []
    for count in (1, 2):
        images = ValidationImages(count)
        images.add(*batch_of("wood", 4), 1)
        images.draw(tmp_path / f"{count}.png", None)
        with Image.open(tmp_path / f"{count}.png") as image:
            heights.append(image.height)
    assert heights[0] < 0.6 * heights[1]
