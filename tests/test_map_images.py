"""Drawings of all maps of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_clip.data import MVTecAD
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
