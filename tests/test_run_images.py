"""Files of the maps of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_picture

from anomaly_clip.data import ImageFolder
from anomaly_clip.recording.run_images import write_map_files
from anomaly_clip.records import Scores
from anomaly_clip.results.map_store import MapStore, Rows

KINDS = ("draws", "masks", "raw_maps")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_only_what_is_asked_for_is_written(tmp_path: Path, kind: str | None) -> None:
    save_picture(tmp_path / "photos" / "a.png")
    data = ImageFolder(str(tmp_path / "photos"), image_size=32)
    maps = MapStore(tmp_path / "scratch")
    values = torch.full((1, 32, 32), 2.5)
    maps.keep(Scores(anomaly_map=values, image_score=torch.ones(1)), [0], ["photos"])
    rows: Rows = {0: {"label": None, "image_score": 1.0}}
    run = tmp_path / "run"
    draws, masks, raw_maps = (name == kind for name in KINDS)
    lost = write_map_files(
        run,
        data,
        maps,
        maps.ranges,
        rows,
        own_size=True,
        draws=draws,
        masks=masks,
        raw_maps=raw_maps,
        thresholds={"photos": 1.0},
        warning=None,
    )
    assert lost == []
    names = {"draws": "maps/photos/a.png", "masks": "masks/photos/a.png"}
    names["raw_maps"] = "raw_maps/photos/a.npy"
    expected = [] if kind is None else [run / names[kind]]
    assert [path for path in run.rglob("*") if path.is_file()] == expected
    if kind == "raw_maps":
        stored = np.load(expected[0])
        assert stored.dtype == np.float16
        assert (stored == 2.5).all()
