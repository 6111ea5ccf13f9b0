from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from anomaly_clip.metrics import PixelHistogram, PixelRanking, pro
from anomaly_clip.metrics.pixel import (
    BFLOAT16,
    FINE,
    FLOAT16,
    PIXEL_FIGURES,
    _count,
    _count_with_opencv,
    _edges,
    _keys,
    _order,
)

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-20, 6e-8, 65519.0, 65521.0, 1e30, -1e30, 3.4e38, -3.4e38]


def random_maps(
    seed: int, kind: str, *, count: int = 3, size: int = 12, share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return maps that lean towards the masks, of several distributions."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, size, size)) < share
    maps = rng.normal(size=masks.shape) + masks * rng.uniform(0, 2)
    if kind == "ties":
        maps = np.round(maps * 2) / 2
    elif kind == "narrow":
        maps = 0.5 + 1e-4 * maps
    elif kind == "wide":
        maps = np.sign(maps) * np.exp(12 * np.abs(maps))
    elif kind == "extremes":
        maps = rng.choice(EXTREMES, masks.shape)
    elif kind == "probability":
        maps = 1 / (1 + np.exp(-maps))
    return torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(masks)


KINDS = ("normal", "ties", "narrow", "wide", "extremes", "probability")


def second_opinion(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Return scikit-learn's figures, and PRO by its definition."""
    scores, target = maps.double().flatten().numpy(), masks.flatten().numpy()
    precision, recall, _ = precision_recall_curve(target, scores)
    total = np.where(precision + recall == 0, 1, precision + recall)
    return {
        "pixel_auroc": roc_auc_score(target, scores),
        "pixel_ap": average_precision_score(target, scores),
        "pixel_f1_max": (2 * precision * recall / total).max(),
        "pixel_pro": pro(maps.double(), masks),
    }


def one(metric: PixelHistogram | PixelRanking, maps: Tensor, masks: Tensor) -> Any:
    metric.update(maps, masks)
    return metric.compute()[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.001, 0.02, 0.3]))
def test_exact_ranking_agrees_with_scikit_learn(seed: int, kind: str, share: float) -> None:
    maps, masks = random_maps(seed, kind, share=share)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    result = one(PixelRanking(), maps, masks)
    assert result.figures == pytest.approx(second_opinion(maps, masks), abs=1e-9)
    assert result.bounds == {}


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([0.001, 0.02, 0.3]),
    st.booleans(),
)
def test_bounds_always_hold(seed: int, kind: str, share: float, fine: bool) -> None:
    maps, masks = random_maps(seed, kind, share=share)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    result = one(PixelHistogram(fine=fine), maps, masks)
    for name, value in second_opinion(maps, masks).items():
        low, high = result.bounds[name]
        assert low <= value <= high, name
        assert low <= result.figures[name] <= high, name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_half_precision_scores_are_exact(seed: int, kind: str, dtype: torch.dtype) -> None:
    maps, masks = random_maps(seed, kind)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    if dtype == torch.float16:
        maps = maps.clamp(-60000, 60000)
    maps = maps.to(dtype)
    maps = torch.where(maps.isfinite(), maps, 1.0)
    result = one(PixelHistogram(), maps, masks)
    assert result.bounds == {}
    assert result.figures == pytest.approx(second_opinion(maps.double(), masks), abs=1e-12)


@pytest.mark.parametrize("fine", [False, True])
def test_streaming_is_close_on_smooth_maps(fine: bool) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((20, 64, 64), bool)
    masks[::2, 20:34, 40:52] = True
    maps = torch.from_numpy(rng.beta(2, 8, masks.shape) + 0.3 * masks * rng.random(masks.shape))
    result = one(PixelHistogram(fine=fine), maps.float(), torch.from_numpy(masks))
    exact = second_opinion(maps.float(), torch.from_numpy(masks))
    tolerance = 2e-6 if fine else 2e-5
    for name in ("pixel_auroc", "pixel_pro"):
        assert result.figures[name] == pytest.approx(exact[name], abs=tolerance)
    assert result.figures["pixel_ap"] == pytest.approx(exact["pixel_ap"], abs=10 * tolerance)
    # The best threshold may lie inside a key.
    assert result.figures["pixel_f1_max"] == pytest.approx(exact["pixel_f1_max"], abs=2e-4)
    width = {name: high - low for name, (low, high) in result.bounds.items()}
    assert max(width.values()) < (1e-3 if fine else 1e-2)


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, FINE])
def test_keys_keep_the_order(kind: int) -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-30, 30, 500), EXTREMES])
    scores = torch.from_numpy(np.sort(drawn.astype(np.float32)))
    position = np.empty(1 << (20 if kind == FINE else 16), np.int64)
    position[_order(kind, len(position))] = np.arange(len(position))
    places = position[_keys(scores, kind).numpy()]
    if kind != FINE:  # minus zero and zero share a place when the figures are computed
        places[places == position[0x8000]] = position[0]
    assert (np.diff(places) >= 0).all()
    assert len(np.unique(places)) > 100


@pytest.mark.parametrize("kind", [FLOAT16, FINE])
def test_a_score_lies_between_the_edges_of_its_key(kind: int) -> None:
    rng = np.random.default_rng(1)
    scores = (rng.normal(size=2000) * 10.0 ** rng.integers(-9, 9, 2000)).astype(np.float32)
    keys = _keys(torch.from_numpy(scores), kind).numpy().astype(np.int64)
    low, high = _edges(keys, kind)
    assert (low <= scores).all()
    assert (scores <= high).all()


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_the_fast_count_equals_the_plain_one(kind: int) -> None:
    for share in (0.0, 0.2):
        maps, masks = random_maps(3, "extremes", share=share)
        fast = _count_with_opencv(maps, masks, kind, 1 << 16)
        plain = _count(maps, masks, kind, 1 << 16)
        for ours, theirs in zip(fast, plain, strict=True):
            if theirs is None:
                assert ours is None
            else:
                assert ours is not None
                assert torch.equal(ours, theirs)


def test_rows_are_apart_and_batches_add_up() -> None:
    maps, masks = random_maps(0, "normal", count=12)
    rows = torch.arange(12) % 3
    together = PixelHistogram(3)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        together.update(maps[start:stop], masks[start:stop], rows[start:stop])
    results = together.compute()
    for row in range(3):
        alone = one(PixelHistogram(), maps[rows == row], masks[rows == row])
        assert results[row].figures == pytest.approx(alone.figures, abs=1e-12)


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
@pytest.mark.parametrize("steps", [50, 200])
def test_stepwise_pro(kind: type[PixelHistogram | PixelRanking], steps: int) -> None:
    maps, masks = random_maps(5, "probability", count=8, size=32)
    expected = pro(maps, masks, pro_steps=steps)
    result = one(kind(pro_steps=steps), maps, masks)
    tolerance = 1e-12 if kind is PixelRanking else 2e-4
    assert result.figures["pixel_pro"] == pytest.approx(expected, abs=tolerance)
    assert "pixel_pro" not in result.bounds


def test_stepwise_pro_of_half_precision_scores_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        maps, masks = random_maps(6, "normal", count=8, size=32)
        maps = maps.to(dtype)
        expected = pro(maps.double(), masks, pro_steps=200)
        result = one(PixelHistogram(pro_steps=200), maps, masks)
        assert result.figures["pixel_pro"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
def test_edge_cases(kind: type[PixelHistogram | PixelRanking]) -> None:
    missing = dict.fromkeys(PIXEL_FIGURES)
    maps, masks = random_maps(0, "normal")
    assert one(kind(), maps, torch.zeros_like(masks)).figures == missing
    assert one(kind(), maps, torch.ones_like(masks)).figures == missing
    metric = kind()
    metric.update(maps[:0], masks[:0])
    assert metric.compute()[0].figures == missing
    single = torch.zeros(1, 4, 4, dtype=torch.bool)
    single[0, 0, 0] = True
    constant = one(kind(), torch.full((1, 4, 4), 2.5), single).figures
    assert constant["pixel_auroc"] == 0.5
    assert constant["pixel_pro"] == pytest.approx(0.15)
    assert constant["pixel_f1_max"] == pytest.approx(2 / 17)
    assert one(kind(pro_steps=200), torch.ones(1, 4, 4), single).figures["pixel_pro"] is None


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_rank_nothing_are_refused(
    kind: type[PixelHistogram | PixelRanking], wrong: float
) -> None:
    maps, masks = random_maps(0, "normal")
    metric = kind()
    broken = maps.clone()
    broken[1, 3, 3] = wrong
    with pytest.raises(ValueError, match="map 1 of the batch holds a score that is NaN or"):
        metric.update(broken, masks)
    with pytest.raises(ValueError, match=r"bool masks, got torch\.float32 and torch\.uint8"):
        metric.update(maps, masks.byte())
    with pytest.raises(ValueError, match="of the same shape"):
        metric.update(maps, masks[:, 1:])
    metric.update(maps, masks)  # nothing of the refused batches was counted
    clean = one(kind(), maps, masks)
    assert metric.compute()[0] == clean


def test_kinds_of_scores_are_not_mixed() -> None:
    maps, masks = random_maps(0, "normal")
    metric = PixelHistogram()
    metric.update(maps.bfloat16(), masks)
    with pytest.raises(ValueError, match="bfloat16 scores and others"):
        metric.update(maps, masks)


def test_large_maps() -> None:
    maps = torch.linspace(-1, 1, 4096).expand(1, 4096, 4096)
    masks = torch.zeros(1, 4096, 4096, dtype=torch.bool)
    masks[0, 1000:1010, 4000:] = True
    result = one(PixelHistogram(), maps, masks)
    assert result.figures["pixel_auroc"] == pytest.approx(4048 / 4096, abs=2e-3)
    constant = PixelHistogram()
    constant.update(torch.zeros(1, 4096, 4096), masks)
    assert int(constant.counts.sum()) == 4096**2  # a single key holds them all


def test_the_state_is_small_and_adds_up() -> None:
    maps, masks = random_maps(0, "normal", count=10)
    whole, left, right = PixelHistogram(), PixelHistogram(), PixelHistogram()
    whole.update(maps, masks)
    left.update(maps[:3], masks[:3])
    right.update(maps[3:], masks[3:])
    for name in ("counts", "positives", "regions", "rounded"):
        total = getattr(left, name) + getattr(right, name)
        torch.testing.assert_close(total, getattr(whole, name), atol=1e-12, rtol=0)
    size = sum(
        getattr(whole, name).numel() * getattr(whole, name).element_size()
        for name in whole._defaults
    )
    assert size <= 2 * 2**20
