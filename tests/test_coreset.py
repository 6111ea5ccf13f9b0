from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.methods import coreset
from anomaly_clip.methods.coreset import k_centre_greedy, project, projected_width


@pytest.mark.golden
def test_golden_k_centre(golden: Callable[[str], Any]) -> None:
    arrays = load_file(golden("detectors").folder / "patchcore.safetensors")
    order = arrays["kcenter_order"]
    chosen = k_centre_greedy(arrays["kcenter_features"], len(order), int(order[0]))
    assert chosen.tolist() == order.tolist()


def plain_k_centre(points: Tensor, count: int, start: int) -> Tensor:
    """Return the greedy order by its definition: one product with all points per centre."""
    points = points - points.mean(dim=0)
    lengths = points.square().sum(dim=1)
    nearest = torch.full_like(lengths, torch.inf)
    chosen = [start]
    while True:
        at = chosen[-1]
        distance = torch.addmv(lengths, points, points[at], alpha=-2).add_(lengths[at])
        torch.minimum(nearest, distance, out=nearest)
        nearest[at] = -torch.inf
        if len(chosen) == count:
            return torch.tensor(chosen)
        chosen.append(int(nearest.argmax()))


def sets_of_points() -> dict[str, Tensor]:
    """Return float64 points whose squared distances are exact, and others."""
    rng = np.random.default_rng(0)
    # Their means are zero, so that integers stay integers and equal distances stay equal.
    half = rng.integers(-3, 4, (60, 2))
    corners = 50 * rng.integers(-1, 2, (64, 3)) + rng.integers(-1, 2, (64, 3))
    integers = {
        "ties": np.concatenate([half, -half]),
        "clusters": np.concatenate([corners, -corners]),
        "line": np.arange(-50, 51)[:, None] * np.array([1, 2]),
        "two places": np.repeat([[1, 1], [-1, -1]], 20, axis=0),
        "equal": np.ones((32, 3)),
        "pair": np.array([[1], [-1]]),
        "few": np.array([[2], [-1], [-1]]),
    }
    others = {
        "normal": rng.normal(1000, 1, (200, 7)),
        "heavy": rng.standard_cauchy((150, 3)),
        "repeated": rng.normal(0, 1, (20, 4))[rng.integers(0, 20, 120)],
        "curve": np.stack([np.geomspace(1e-3, 1e3, 100), np.zeros(100)], axis=1),
    }
    return {name: torch.from_numpy(p).double() for name, p in (integers | others).items()}


@pytest.mark.parametrize(
    ("fewest", "most", "at_once"), [(1, 1, 40), (2, 5, 100), (32, 256, 1 << 18)]
)
@pytest.mark.parametrize("name", sets_of_points())
def test_blocks_keep_the_plain_order(
    name: str, fewest: int, most: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreset, "FEWEST", fewest)
    monkeypatch.setattr(coreset, "MOST", most)
    monkeypatch.setattr(coreset, "IN_CACHE", at_once)
    points = sets_of_points()[name]
    # The order among points that repeat selected ones is a matter of rounding, unless it is exact.
    count = len(points.unique(dim=0)) if name == "repeated" else len(points)
    for start in (0, len(points) - 1):
        chosen = k_centre_greedy(points, count, start)
        assert chosen.tolist() == plain_k_centre(points, count, start).tolist()
    for fewer in (1, 2, count // 2):
        assert k_centre_greedy(points, max(1, fewer), start).tolist() == chosen[:fewer].tolist()
    assert sorted(k_centre_greedy(points, len(points), 0).tolist()) == list(range(len(points)))


def nearest_squares(points: Tensor, chosen: Tensor) -> Tensor:
    return torch.cdist(points.double(), points[chosen].double()).square().amin(dim=1)


@pytest.mark.parametrize("seed", range(4))
def test_float32_differs_only_where_distances_hardly_do(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(400, 30, generator=generator)
    ours, plain = k_centre_greedy(points, 200, 3), plain_k_centre(points, 200, 3)
    differ = (ours != plain).nonzero().flatten().tolist()
    if differ:
        nearest = nearest_squares(points, plain[: differ[0]])
        pair = nearest[[ours[differ[0]], plain[differ[0]]]]
        assert float(pair.min()) > (1 - 1e-5) * float(pair.max())
    radii = [nearest_squares(points, chosen).max().sqrt() for chosen in (ours, plain)]
    assert float(radii[0]) == pytest.approx(float(radii[1]), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_k_centre_matches_all_distances(offset: float) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(offset, 1, (300, 7)).astype(np.float32)
    chosen = [5]
    while len(chosen) < 40:
        chosen.append(int(cdist(points, points[chosen]).min(axis=1).argmax()))
    assert k_centre_greedy(torch.from_numpy(points), 40, 5).tolist() == chosen


def test_most_points_are_selected_without_reading_all_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def counted(selected: Tensor, *tensors: Tensor) -> None:
        sizes.append(len(selected))
        include(selected, *tensors)

    include = coreset._include
    monkeypatch.setattr(coreset, "_include", counted)
    points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    k_centre_greedy(points, 1000, 0)
    assert len(sizes) < 60
    assert sizes[0] == 1
    assert max(sizes) > coreset.FEWEST  # with more candidates than at first
    assert sum(sizes) < 1000  # not after the last block


def test_one_point_and_equal_points() -> None:
    assert k_centre_greedy(torch.ones(1, 3), 1, 0).tolist() == [0]
    points = torch.ones(5, 3)
    assert k_centre_greedy(points, 5, 2).tolist() == [2, 0, 1, 3, 4]


def test_points_that_are_not_a_number_end() -> None:
    points = torch.randn(50, 3)
    points[7, 1] = torch.nan
    expected = plain_k_centre(points, 20, 4).tolist()
    assert k_centre_greedy(points, 20, 4).tolist() == expected


def test_reduced_precision_leaves_the_order_as_it_is() -> None:
    points = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    expected = k_centre_greedy(points, 100, 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert k_centre_greedy(points, 100, 0).tolist() == expected.tolist()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_each_selected_point_advances_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(items: Iterable[Any], title: str, total: int) -> Iterator[Any]:
        items = list(items)
        calls.append((len(items), title, total))
        return iter(items)

    monkeypatch.setattr(coreset, "track", recorded)
    k_centre_greedy(torch.randn(90, 2), 80, 0)
    assert calls == [(80, "choosing patches", 80)]


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
