from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from anomaly_clip.metrics import PixelHistogram, PixelRanking, pro
from anomaly_clip.metrics.bins import Bins
from anomaly_clip.metrics.keys import (
    BFLOAT16,
    FINE,
    FLOAT16,
    count_keys,
    count_with_opencv,
    key_edges,
    key_order,
    score_keys,
)
from anomaly_clip.metrics.pixel import PIXEL_METRICS

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-20, 6e-8, 65519.0, 65521.0, 1e30, -1e30, 3.4e38, -3.4e38]


def random_maps(
    seed: int, kind: str, *, count: int = 3, size: int = 12, share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return maps of the given distribution, and masks with which the maps correlate."""
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
    """Return scikit-learn's metrics, and PRO from exact scores."""
    scores, target = maps.double().flatten().numpy(), masks.flatten().numpy()
    precision, recall, _ = precision_recall_curve(target, scores)
    total = np.where(precision + recall == 0, 1, precision + recall)
    return {
        "pixel_auroc": roc_auc_score(target, scores),
        "pixel_ap": average_precision_score(target, scores),
        "pixel_f1_max": (2 * precision * recall / total).max(),
        "pixel_pro": pro(maps.double(), masks),
    }


def evaluate(metric: PixelHistogram | PixelRanking, maps: Tensor, masks: Tensor) -> Any:
    metric.update(maps, masks)
    return metric.compute()[0]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.001, 0.02, 0.3]))
def test_exact_ranking_agrees_with_scikit_learn(seed: int, kind: str, share: float) -> None:
    maps, masks = random_maps(seed, kind, share=share)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    result = evaluate(PixelRanking(), maps, masks)
    assert result.metrics == pytest.approx(second_opinion(maps, masks), abs=1e-9)
    assert result.bounds == {}


@settings(max_examples=100)
@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([0.001, 0.02, 0.3]),
    st.booleans(),
)
def test_bounds_always_hold(seed: int, kind: str, share: float, fine: bool) -> None:
    maps, masks = random_maps(seed, kind, share=share)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    result = evaluate(PixelHistogram(fine=fine), maps, masks)
    for name, value in second_opinion(maps, masks).items():
        low, high = result.bounds[name]
        assert low <= value <= high, name
        assert low <= result.metrics[name] <= high, name


@settings(max_examples=60)
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
    result = evaluate(PixelHistogram(), maps, masks)
    assert result.bounds == {}
    assert result.metrics == pytest.approx(second_opinion(maps.double(), masks), abs=1e-12)


@pytest.mark.parametrize("fine", [False, True])
def test_streaming_is_close_on_smooth_maps(fine: bool) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((20, 64, 64), bool)
    masks[::2, 20:34, 40:52] = True
    maps = torch.from_numpy(rng.beta(2, 8, masks.shape) + 0.3 * masks * rng.random(masks.shape))
    result = evaluate(PixelHistogram(fine=fine), maps.float(), torch.from_numpy(masks))
    exact = second_opinion(maps.float(), torch.from_numpy(masks))
    tolerance = 2e-6 if fine else 2e-5  # fewer pixels than in the benchmark
    for name in ("pixel_auroc", "pixel_pro"):
        assert result.metrics[name] == pytest.approx(exact[name], abs=tolerance)
    assert result.metrics["pixel_ap"] == pytest.approx(exact["pixel_ap"], abs=10 * tolerance)
    # The threshold of the highest F1 may lie between two scores with the same key.
    assert result.metrics["pixel_f1_max"] == pytest.approx(exact["pixel_f1_max"], abs=2e-4)
    width = {name: high - low for name, (low, high) in result.bounds.items()}
    assert max(width.values()) < (1e-3 if fine else 1e-2)


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, FINE])
def test_keys_keep_the_order(kind: int) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-30, 30, 500), EXTREMES])
    scores = torch.from_numpy(np.sort(values.astype(np.float32)))
    position = np.empty(1 << (20 if kind == FINE else 16), np.int64)
    position[key_order(len(position))] = np.arange(len(position))
    places = position[score_keys(scores, kind).numpy()]
    if kind != FINE:  # zero and minus zero share a place when metrics are computed
        places[places == position[0x8000]] = position[0]
    assert (np.diff(places) >= 0).all()
    assert len(np.unique(places)) > 100


@pytest.mark.parametrize("kind", [FLOAT16, FINE])
def test_a_score_lies_between_the_edges_of_its_key(kind: int) -> None:
    rng = np.random.default_rng(1)
    scores = (rng.normal(size=2000) * 10.0 ** rng.integers(-9, 9, 2000)).astype(np.float32)
    keys = score_keys(torch.from_numpy(scores), kind).numpy().astype(np.int64)
    low, high = key_edges(keys, kind)
    assert (low <= scores).all()
    assert (scores <= high).all()


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_counting_with_opencv_equals_plain_counting(kind: int) -> None:
    for share in (0.0, 0.2):
        maps, masks = random_maps(3, "extremes", share=share)
        fast = count_with_opencv(maps, masks, kind, 1 << 16)
        plain = count_keys(maps, masks, kind, 1 << 16)
        for ours, theirs in zip(fast, plain, strict=True):
            if theirs is None:
                assert ours is None
            else:
                assert ours is not None
                assert torch.equal(ours, theirs)


def test_rows_are_separate_and_batches_add_up() -> None:
    maps, masks = random_maps(0, "normal", count=12)
    rows = torch.arange(12) % 3
    together = PixelHistogram(3)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        together.update(maps[start:stop], masks[start:stop], rows[start:stop])
    results = together.compute()
    for row in range(3):
        alone = evaluate(PixelHistogram(), maps[rows == row], masks[rows == row])
        assert results[row].metrics == pytest.approx(alone.metrics, abs=1e-12)


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
@pytest.mark.parametrize("steps", [50, 200])
def test_stepwise_pro(kind: type[PixelHistogram | PixelRanking], steps: int) -> None:
    maps, masks = random_maps(5, "probability", count=8, size=32)
    expected = pro(maps, masks, pro_steps=steps)
    result = evaluate(kind(pro_steps=steps), maps, masks)
    tolerance = 1e-12 if kind is PixelRanking else 2e-4
    assert result.metrics["pixel_pro"] == pytest.approx(expected, abs=tolerance)


@example(49, "normal", 20, False, 0.05)  # fractions whose sum is just above 1
@settings(max_examples=100)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["normal", "ties", "probability", "narrow", "very narrow", "wide"]),
    st.sampled_from([20, 200]),
    st.booleans(),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_bounds_of_stepwise_pro_always_hold(
    seed: int, kind: str, steps: int, fine: bool, limit: float
) -> None:
    maps, masks = random_maps(seed, kind)
    if kind == "very narrow":
        maps = 0.5 + 1e-6 * maps
    masks[0, 0, 0] = True
    expected = pro(maps, masks, pro_steps=steps, fpr_limit=limit)
    result = evaluate(PixelHistogram(pro_steps=steps, fine=fine, fpr_limit=limit), maps, masks)
    if result.metrics["pixel_pro"] is None or np.isnan(expected):
        return
    low, high = result.bounds["pixel_pro"]
    assert low <= expected <= high
    assert low <= result.metrics["pixel_pro"] <= high


def test_bounds_of_stepwise_pro_are_narrow_on_smooth_maps() -> None:
    maps, masks = random_maps(5, "probability", count=8, size=64)
    low, high = evaluate(PixelHistogram(pro_steps=200), maps, masks).bounds["pixel_pro"]
    assert high - low < 0.02
    low, high = evaluate(PixelHistogram(pro_steps=200, fine=True), maps, masks).bounds["pixel_pro"]
    assert high - low < 0.002


def test_stepwise_pro_of_half_precision_scores_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        maps, masks = random_maps(6, "normal", count=8, size=32)
        maps = maps.to(dtype)
        expected = pro(maps.double(), masks, pro_steps=200)
        for fine in (False, True):
            result = evaluate(PixelHistogram(pro_steps=200, fine=fine), maps, masks)
            exact = not fine or dtype == torch.float16
            tolerance = 1e-12 if exact else 2e-3
            assert result.metrics["pixel_pro"] == pytest.approx(expected, abs=tolerance)
            assert (result.bounds == {}) == exact


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
def test_edge_cases(kind: type[PixelHistogram | PixelRanking]) -> None:
    missing = dict.fromkeys(PIXEL_METRICS)
    maps, masks = random_maps(0, "normal")
    assert evaluate(kind(), maps, torch.zeros_like(masks)).metrics == missing
    assert evaluate(kind(), maps, torch.ones_like(masks)).metrics == missing
    metric = kind()
    metric.update(maps[:0], masks[:0])
    assert metric.compute()[0].metrics == missing
    single = torch.zeros(1, 4, 4, dtype=torch.bool)
    single[0, 0, 0] = True
    constant = evaluate(kind(), torch.full((1, 4, 4), 2.5), single).metrics
    assert constant["pixel_auroc"] == 0.5
    assert constant["pixel_pro"] == pytest.approx(0.15)
    assert constant["pixel_f1_max"] == pytest.approx(2 / 17)
    assert evaluate(kind(pro_steps=200), torch.ones(1, 4, 4), single).metrics["pixel_pro"] is None


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(
    kind: type[PixelHistogram | PixelRanking], wrong: float
) -> None:
    maps, masks = random_maps(0, "normal")
    metric = kind()
    broken = maps.clone()
    broken[1, 3, 3] = wrong
    with pytest.raises(ValueError, match="map 1 of the batch has a score that is NaN or"):
        metric.update(broken, masks)
    with pytest.raises(ValueError, match=r"bool masks, got torch\.float32 and torch\.uint8"):
        metric.update(maps, masks.byte())
    with pytest.raises(ValueError, match="of the same shape"):
        metric.update(maps, masks[:, 1:])
    metric.update(maps, masks)  # nothing of the refused batches was counted
    clean = evaluate(kind(), maps, masks)
    assert metric.compute()[0] == clean


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bfloat16_and_other_scores_are_not_mixed() -> None:
    maps, masks = random_maps(0, "normal")
    metric = PixelHistogram()
    metric.update(maps.bfloat16(), masks)
    metric.update(maps, masks)
    with pytest.raises(ValueError, match="bfloat16 scores and others"):
        metric.compute()


def test_fine_keys_of_bfloat16_have_bounds() -> None:
    maps, masks = random_maps(0, "normal")
    result = evaluate(PixelHistogram(fine=True), (maps * 1e-20).bfloat16(), masks)
    low, high = result.bounds["pixel_auroc"]
    assert low <= second_opinion((maps * 1e-20).bfloat16().double(), masks)["pixel_auroc"] <= high


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0]), r"expected rows int64 \(3,\)"),
        (torch.tensor([0, 1, 2]), "rows must be in 0 to 1"),
        (torch.tensor([0, -1, 0]), "rows must be in 0 to 1"),
    ],
)
def test_rows_must_exist(rows: Tensor, message: str) -> None:
    maps, masks = random_maps(0, "normal")
    for metric in (PixelHistogram(2), PixelRanking(2)):
        with pytest.raises(ValueError, match=message):
            metric.update(maps, masks, rows)


def test_counts_whose_products_do_not_fit_into_64_bits() -> None:
    counts = np.array([3 * 10**9, 0]), np.array([0, 3 * 10**9])
    assert Bins(*counts, np.array([1.0, 0.0])).ranking().auroc() == 1.0
    assert Bins(*counts[::-1], np.array([0.0, 1.0])).ranking().auroc() == 0.0
    both = Bins(counts[0] + counts[1], counts[0] + counts[1], np.array([0.5, 0.5]))
    assert both.ranking().auroc() == pytest.approx(0.5)


def test_reset_inside_inference_mode_and_update_outside() -> None:
    maps, masks = random_maps(0, "normal")
    metric = PixelHistogram()
    with torch.inference_mode():
        metric.update(maps, masks)
        first = metric.compute()[0]
        metric.reset()
    assert evaluate(metric, maps, masks) == first


def test_scores_too_large_for_half_precision_show_in_the_bounds() -> None:
    maps, masks = random_maps(0, "normal")
    maps = 1e6 * maps
    result = evaluate(PixelHistogram(), maps, masks)
    low, high = result.bounds["pixel_auroc"]
    assert high - low > 0.1
    assert low <= second_opinion(maps, masks)["pixel_auroc"] <= high


def test_large_maps() -> None:
    maps = torch.linspace(-1, 1, 4096).expand(1, 4096, 4096)
    masks = torch.zeros(1, 4096, 4096, dtype=torch.bool)
    masks[0, 1000:1010, 4000:] = True
    result = evaluate(PixelHistogram(), maps, masks)
    assert result.metrics["pixel_auroc"] == pytest.approx(4048 / 4096, abs=2e-3)
    constant = PixelHistogram()
    constant.update(torch.zeros(1, 4096, 4096), masks)
    assert int(constant.counts.sum()) == 4096**2  # all scores have the same key
    beyond = PixelHistogram()
    beyond.update(torch.zeros(1, 4097, 4097), torch.ones(1, 4097, 4097, dtype=torch.bool))
    assert int(beyond.counts.sum()) == 4097**2  # more than float32 can count
    assert beyond.compute()[0].metrics == dict.fromkeys(PIXEL_METRICS)


def test_the_state_is_small_and_states_can_be_merged() -> None:
    maps, masks = random_maps(0, "normal", count=10)
    whole, left, right = PixelHistogram(), PixelHistogram(), PixelHistogram()
    whole.update(maps, masks)
    left.update(maps[:3], masks[:3])
    right.update(maps[3:], masks[3:])
    left.merge_state(right)
    assert left.compute()[0].metrics == pytest.approx(whole.compute()[0].metrics, abs=1e-12)
    tensors = [value for value in vars(whole).values() if isinstance(value, Tensor)]
    tensors += [value for value in whole._defaults.values() if isinstance(value, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) <= 2 * 2**20


def test_two_processes_compute_the_metrics_of_a_single_one(tmp_path: Path) -> None:
    """All-reduce over two gloo processes, one of which saw a single image."""
    maps, masks = random_maps(0, "normal", count=10)
    whole = PixelHistogram(pro_steps=50)
    whole.update(maps, masks)
    start_processes(_run_rank, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == pytest.approx(whole.compute()[0].metrics, abs=1e-12)


def _run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    maps, masks = random_maps(0, "normal", count=10)
    part = slice(0, 1) if rank else slice(1, 10)
    metric = PixelHistogram(pro_steps=50)
    metric.update(maps[part], masks[part])
    (folder / f"{rank}.json").write_text(json.dumps(metric.compute()[0].metrics))
    metric.update(maps[:0], masks[:0])  # restores the counts from before the synchronisation
    assert int(metric.counts.sum()) == maps[part].numel()
    dist.destroy_process_group()
