"""Maps that wait on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from anomaly_clip.records import Scores
from anomaly_clip.results.map_store import MapStore


def test_small_maps_are_kept_for_small_pictures(tmp_path: Path) -> None:
    kept = MapStore(tmp_path, longest=8)
    maps = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(0))
    scores = Scores(anomaly_map=maps, image_score=torch.zeros(2))
    kept.keep(scores, [4, 7], ["nut", "cap"])
    assert kept.load(7)["map"].shape == (4, 8)
    assert kept.ranges["nut"] == [float(maps[0].min()), float(maps[0].max())]  # of the whole map
    assert (4 in kept, 5 in kept) == (True, False)
