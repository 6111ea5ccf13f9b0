"""Anomaly maps stored on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from anomaly_clip.records import Scores
from anomaly_clip.results.map_store import MapStore


def test_maps_are_shrunk_for_small_drawings(tmp_path: Path) -> None:
    store = MapStore(tmp_path, longest=8)
    maps = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(0))
    scores = Scores(anomaly_map=maps, image_score=torch.zeros(2))
    store.keep(scores, [4, 7], ["nut", "cap"])
    assert store.load(7)["map"].shape == (4, 8)
    assert store.ranges["nut"] == [
        float(maps[0].min()),
        float(maps[0].max()),
    ]  # range before shrinking
    assert (4 in store, 5 in store) == (True, False)
