"""Masks of the pixels above the map threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image

from anomaly_clip.data import Demo, ImageFolder
from anomaly_clip.image_formats import is_own_drawing
from anomaly_clip.masks import read_mask
from anomaly_clip.recording.mask_images import write_masks
from anomaly_clip.records import Scores
from anomaly_clip.results.map_store import MapStore


def stored(folder: Path, values: np.ndarray, count: int, category: str) -> MapStore:
    """Return a store of the same map for the first images."""
    maps = MapStore(folder)
    batch = torch.from_numpy(values).float().expand(count, -1, -1)
    scores = Scores(anomaly_map=batch, image_score=torch.zeros(count))
    maps.keep(scores, list(range(count)), [category] * count)
    return maps


HALF = np.zeros((32, 32), np.float32)
HALF[:, 16:] = 2.0


@pytest.mark.parametrize("own_size", [False, True])
def test_pixels_above_the_threshold_are_white(tmp_path: Path, own_size: bool) -> None:
    wide = save_picture(tmp_path / "photos" / "a.png", np.zeros((40, 64, 3), np.uint8))
    turned = Image.fromarray(np.zeros((40, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(wide.with_name("b.jpg"), exif=exif)
    data = ImageFolder(str(tmp_path / "photos"), image_size=32)
    maps = stored(tmp_path / "scratch", HALF, 2, "photos")
    assert write_masks(tmp_path / "masks", data, maps, {"photos": 1.0}, own_size) == []
    sizes = [(40, 64), (64, 40)] if own_size else [(32, 32), (32, 32)]
    for name, size in zip("ab", sizes, strict=True):
        file = tmp_path / "masks" / "photos" / f"{name}.png"
        mask = read_mask(file)
        assert mask.shape == size
        assert mask[:, size[1] // 2 :].all()
        assert not mask[:, : size[1] // 2].any()
        assert not is_own_drawing(file)  # so that it can be read as a mask
        with Image.open(file) as image:
            assert image.mode == "L"
            assert image.getextrema() == (0, 255)


@pytest.mark.parametrize(("threshold", "share"), [(2.0, 0), (-1.0, 1)])
def test_the_threshold_itself_is_not_marked(tmp_path: Path, threshold: float, share: int) -> None:
    save_picture(tmp_path / "photos" / "a.png")
    data = ImageFolder(str(tmp_path / "photos"), image_size=32)
    maps = stored(tmp_path / "scratch", HALF, 1, "photos")
    write_masks(tmp_path / "masks", data, maps, {"photos": threshold}, own_size=True)
    assert read_mask(tmp_path / "masks" / "photos" / "a.png").mean() == share


def test_images_that_are_lost_have_no_mask(tmp_path: Path) -> None:
    for name in "ab":
        save_picture(tmp_path / "photos" / f"{name}.png")
    data = ImageFolder(str(tmp_path / "photos"), image_size=32)
    data.samples("test")
    maps = stored(tmp_path / "scratch", HALF, 2, "photos")
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    (lost,) = write_masks(tmp_path / "masks", data, maps, {"photos": 1.0}, own_size=True)
    assert Path(lost.path).name == "a.png"
    assert [p.name for p in (tmp_path / "masks").rglob("*.png")] == ["b.png"]


def test_images_that_are_no_files(tmp_path: Path) -> None:
    data = Demo(image_size=32)
    category = data.categories[0]
    maps = stored(tmp_path / "scratch", HALF, 1, category)
    write_masks(tmp_path / "masks", data, maps, dict.fromkeys(data.categories, 1.0), own_size=True)
    (file,) = (tmp_path / "masks").rglob("*.png")
    assert read_mask(file).shape == data.reader()(data.samples("test")[0])[0].shape[:2]
