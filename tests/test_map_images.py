"""Drawings of all maps of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image

from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.recording.map_images import draw_map_images
from anomaly_clip.records import Scores
from anomaly_clip.results.map_store import MapStore, Rows


@pytest.mark.parametrize("own_size", [False, True])
def test_one_file_per_image_on_the_scale_of_its_category(
    mvtec_root: Path, tmp_path: Path, own_size: bool
) -> None:
    data = MVTecAD(str(mvtec_root), categories=["bottle"], image_size=32)
    maps = MapStore(tmp_path / "scratch")
    values = torch.stack([torch.full((32, 32), level) for level in (0.0, 1.0)])
    indices = [1, 3]  # the second normal image, and the second one with a scratch
    maps.keep(Scores(anomaly_map=values, image_score=torch.ones(2)), indices, ["bottle"] * 2)
    rows: Rows = {1: {"label": 0, "image_score": 0.0}, 3: {"label": 1, "image_score": 1.0}}
    draw_map_images(tmp_path / "maps", data, maps, maps.ranges, rows, own_size, None)
    files = sorted((tmp_path / "maps").rglob("*.png"))
    assert [file.relative_to(tmp_path / "maps").as_posix() for file in files] == [
        "bottle/good/001.png",
        "bottle/scratch/001.png",
    ]
    dark, bright = (np.asarray(Image.open(file)) for file in files)
    width = 240
    # Panels: image, map and mask. In the original size, normal images have no mask panel.
    assert dark.shape[1] == (2 * width + 4 if own_size else 3 * width + 2 * 4)
    assert bright.shape[1] == 3 * width + 2 * 4
    heat = slice(width + 10, 2 * width - 10)
    assert dark[-100:, heat].max() < 10
    assert bright[-100:, heat].mean() > 150


def test_large_images_are_drawn_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_clip.recording.map_images.MAX_DRAWN", 60_000)
    wide = np.zeros((400, 600, 3), np.uint8)
    wide[:, :300] = 200
    for name in ("good/a", "cut/b", "ground_truth/cut/b"):
        save_picture(tmp_path / "photos" / f"{name}.png", wide)
    data = ImageFolder(str(tmp_path / "photos"), image_size=32)
    maps = MapStore(tmp_path / "scratch")
    maps.keep(Scores(anomaly_map=torch.ones(1, 32, 32), image_score=torch.ones(1)), [0], ["photos"])
    rows: Rows = {0: {"label": 1, "image_score": 0.5}}
    draw_map_images(tmp_path / "maps", data, maps, maps.ranges, rows, True, None)
    sheet = np.asarray(Image.open(next((tmp_path / "maps").rglob("*.png"))))
    assert sheet.shape[1] == 3 * 300 + 2 * 4  # image, map and mask of 300 x 200 pixels
    panels = sheet[-200:]
    assert (panels[:, 10:140] == 200).all()
    assert (panels[:, 160:290] == 0).all()
    assert (panels[:, 2 * 304 + 10 : 2 * 304 + 140] == 255).all()
    assert (panels[:, 2 * 304 + 160 : 2 * 304 + 290] == 0).all()
