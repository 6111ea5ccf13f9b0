from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from torch.testing import assert_close

from anomaly_clip.methods.coreset import k_centre_greedy, project, projected_width


@pytest.mark.golden
def test_golden_k_centre(golden: Callable[[str], Any]) -> None:
    arrays = load_file(golden("detectors").folder / "patchcore.safetensors")
    order = arrays["kcenter_order"]
    chosen = k_centre_greedy(arrays["kcenter_features"], len(order), int(order[0]))
    assert chosen.tolist() == order.tolist()


def plain_k_centre(points: np.ndarray, count: int, start: int) -> list[int]:
    chosen = [start]
    while len(chosen) < count:
        chosen.append(int(cdist(points, points[chosen]).min(axis=1).argmax()))
    return chosen


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_k_centre_matches_the_plain_algorithm(offset: float) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(offset, 1, (300, 7)).astype(np.float32)
    chosen = k_centre_greedy(torch.from_numpy(points), 40, 5)
    assert chosen.tolist() == plain_k_centre(points.astype(np.float64), 40, 5)


def test_equal_points_are_not_chosen_twice() -> None:
    points = torch.ones(5, 3)
    assert sorted(k_centre_greedy(points, 5, 2).tolist()) == list(range(5))


def test_a_projection_keeps_distances() -> None:
    points = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (60, 600))).float()
    narrow = project(points, seed=1)
    assert narrow.shape == (60, projected_width(60, 600, 0.9))
    assert narrow.shape[1] < 600
    ratio = torch.pdist(narrow).square() / torch.pdist(points).square()
    assert 0.1 < float(ratio.min()) < float(ratio.max()) < 1.9
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert_close(project(points, seed=1), narrow, atol=0, rtol=0)
    assert not torch.equal(project(points, seed=2), narrow)
    few = points[:, :50]
    assert project(few, seed=1) is few
