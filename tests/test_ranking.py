"""Counts of normal scores between thresholds equal those of the sorted scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly_clip.metrics import PixelRanking, pro, ranking
from anomaly_clip.metrics.pixel import PixelResult
from anomaly_clip.metrics.pro import in_order
from anomaly_clip.metrics.ranking import FEW, Cells, normal_counts, sorted_counts

Make = Callable[[NDArray[np.float64]], NDArray[np.float64]]

NUM = FEW + 20_001
KINDS: dict[str, Make] = {
    "normal": lambda x: x,
    "ties": lambda x: np.round(x * 4) / 4,
    "two values": lambda x: np.where(x > 1, 0.7, 0.1),
    "narrow, offset": lambda x: 1000 + 1e-3 * x,
    "negative": lambda x: -5 - np.exp(x),
    "huge range": lambda x: np.sign(x) * np.exp(np.minimum(20 * np.abs(x), 87)),
    "whole range": lambda x: np.clip(1e38 * x, -3.4e38, 3.4e38),
    "tiny": lambda x: 1e-42 * x,
    "zeros": lambda x: np.where(x > 0, 0.0, -0.0),
    "constant": lambda x: np.full_like(x, 0.3),
    "separate": lambda x: np.where(x > 2, x + 50, x),
}


def scores(kind: str, count: int, shift: float, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return KINDS[kind](rng.normal(size=count) + shift).astype(np.float32)


def assert_equal_counts(parts: list[NDArray[np.float32]], thresholds: NDArray[np.float32]) -> None:
    for fast, plain in zip(
        normal_counts(parts, thresholds), sorted_counts(parts, thresholds), strict=True
    ):
        np.testing.assert_array_equal(fast, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_anomalous", [1, 700])
def test_counts_equal_those_of_the_sorted_scores(kind: str, num_anomalous: int) -> None:
    normal = scores(kind, NUM, 0, 0)
    normal[:50] = -np.inf  # in place of anomalous pixels
    normal[50:60] = scores(kind, 10, 2, 2)[:10]
    thresholds = np.unique(np.append(scores(kind, num_anomalous - 1, 2, 1), normal[55]))
    assert_equal_counts([normal[:7], normal[7:70_000], normal[70_000:]], thresholds)


@pytest.mark.parametrize("kind", ["normal", "narrow, offset", "negative", "separate"])
def test_scores_are_divided_into_cells_rather_than_sorted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(*_: object) -> None:
        raise AssertionError("all scores were sorted")

    thresholds, normal = np.unique(scores(kind, 300, 2, 1)), scores(kind, NUM, 0, 0)
    expected = sorted_counts([normal], thresholds)
    monkeypatch.setattr(ranking, "sorted_counts", unused)
    for fast, plain in zip(normal_counts([normal], thresholds), expected, strict=True):
        np.testing.assert_array_equal(fast, plain)


def test_the_cell_of_a_score_rises_with_the_score() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        sample, thresholds = scores(kind, 5000, 0, 0), np.unique(scores(kind, 50, 2, 1))
        cells = Cells.around(sample, thresholds)
        if cells is None:
            assert kind in ("whole range", "tiny", "zeros"), kind
            continue
        edges = rng.uniform(cells.low, cells.high, 20).astype(np.float32)
        near = [edges, np.nextafter(edges, np.float32(9e9)), sample, thresholds]
        some = np.sort(np.concatenate([*near, np.array([-np.inf, np.inf], np.float32)]))
        keys = cells.keys(some).astype(int)
        assert (np.diff(keys) >= 0).all()
        assert keys[0] == 0
        # Numbers of other lengths and alignments have the same cells.
        assert (cells.keys(some[3:-2]) == keys[3:-2]).all()


def evaluate(maps: torch.Tensor, masks: torch.Tensor) -> PixelResult:
    metric = PixelRanking()
    for part, mask in zip(maps.split(3), masks.split(3), strict=True):
        metric.update(part, mask)
    return metric.compute()[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.03, 0.5])
def test_exact_metrics_of_many_pixels_equal_scikit_learn_and_pro(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((8, 120, 120)) < share
    masks[2, 5, 7] = share > 0  # a share of 1e-9 is one pixel
    maps = KINDS[kind](rng.normal(size=masks.shape) + masks).astype(np.float32)
    result = evaluate(torch.from_numpy(maps), torch.from_numpy(masks))
    if not share:
        assert set(result.metrics.values()) == {None}
        return
    target, flat = masks.ravel(), maps.astype(np.float64).ravel()
    assert result.metrics["pixel_auroc"] == pytest.approx(roc_auc_score(target, flat), abs=1e-12)
    expected = average_precision_score(target, flat)
    assert result.metrics["pixel_ap"] == pytest.approx(expected, abs=1e-12)
    plain = pro(torch.from_numpy(maps), torch.from_numpy(masks))
    assert result.metrics["pixel_pro"] == pytest.approx(plain, abs=1e-12)


def test_double_precision_is_kept() -> None:
    maps = torch.linspace(1, 1 + 1e-9, 50_000, dtype=torch.float64).view(1, 250, 200)
    masks = torch.zeros(1, 250, 200, dtype=torch.bool)
    masks[0, -1, -10:] = True
    assert evaluate(maps, masks).metrics["pixel_auroc"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_as_integers_keeps_scores_and_weights_together(kind: str) -> None:
    hit = scores(kind, 3000, 0, 0)
    values, weights = in_order(hit, np.arange(3000.0))
    np.testing.assert_array_equal(values, np.sort(hit))
    np.testing.assert_array_equal(values, hit[weights.astype(int)])
