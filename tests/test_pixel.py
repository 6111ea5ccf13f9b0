from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from anomaly_clip.maps import gaussian_blur
from anomaly_clip.metric_values import PIXEL_METRICS
from anomaly_clip.metrics import PixelHistogram, PixelRanking, pro
from anomaly_clip.metrics.pixel import (
    MAX_SEPARATE,
    MAX_WINDOWS,
    defects_of,
    pixels_of,
    pixels_on_device,
)
from anomaly_clip.metrics.windows import HalfWindow, LinearWindow

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


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([0.001, 0.02, 0.3]),
    st.booleans(),
)
def test_bounds_always_hold(seed: int, kind: str, share: float, fine: bool) -> None:
    maps, masks = random_maps(seed, kind, count=4, size=66, share=share)
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    result = evaluate(PixelHistogram(fine=fine), maps, masks)
    for name, value in second_opinion(maps, masks).items():
        low, high = result.bounds.get(name, (result.metrics[name],) * 2)
        assert low - 1e-12 <= value <= high + 1e-12, name
        assert low <= result.metrics[name] <= high, name


TRANSFORMS = st.one_of(
    st.tuples(
        st.sampled_from([1e-9, 1e-4, 0.37, 1.0, 65504.0, 1e9]),
        st.sampled_from([0.0, 0.5, -3.0, 100.0, -1000.0, 1e4]),  # times the range
    ),
    st.tuples(
        st.floats(-9, 9).map(lambda power: 10.0**power),
        st.floats(-1e4, 1e4),
    ),
)


@settings(max_examples=40)
@given(st.integers(0, 10**6), TRANSFORMS, st.sampled_from(["probability", "narrow", "wide"]))
def test_metrics_are_right_for_any_range_and_offset(
    seed: int, transform: tuple[float, float], kind: str
) -> None:
    maps, masks = random_maps(seed, kind, count=6, size=70, share=0.02)
    scale, offset = transform
    span = (maps.double().max() - maps.double().min()) * scale
    maps = (scale * maps.double() + offset * span).float()
    assume(maps.isfinite().all())
    metric = PixelHistogram()
    for part, mask in zip(maps.split(4), masks.split(4), strict=True):
        metric.update(part, mask)
    result = metric.compute()[0]
    for name, value in second_opinion(maps, masks).items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-3), name
        low, high = result.bounds.get(name, (value, value))
        assert low - 1e-12 <= value <= high + 1e-12, name
        assert high - low < 2e-3, name


@pytest.mark.parametrize("levels", [1, 2, 3, 256])
def test_maps_with_few_different_scores_are_exact(levels: int) -> None:
    maps, masks = random_maps(3, "probability", count=6, size=70)
    maps = 0.1 + 0.6 * (maps * levels).floor().clamp(max=levels - 1) / levels
    metric = PixelHistogram()
    for part, mask in zip(maps.split(2), masks.split(2), strict=True):
        metric.update(part, mask)
    result = metric.compute()[0]
    assert result.bounds == {}
    assert result.metrics == pytest.approx(second_opinion(maps, masks), abs=1e-9)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_batches_of_other_ranges_are_separated_too(late: bool, order: int) -> None:
    """Normal images crowd within 1e-4 of each other, and others do not; either may come first."""
    wide, masks = random_maps(1, "probability", count=4, size=80, share=0.05)
    crowded = 0.5 + 1e-4 * random_maps(2, "probability", count=4, size=80)[0]
    maps = torch.cat([wide, crowded][::order])
    if late:
        maps = torch.cat([maps, 1000 + maps])
    nothing = torch.zeros_like(masks)
    masks = torch.cat([masks, nothing][::order])
    masks = torch.cat([masks, masks]) if late else masks
    metric = PixelHistogram()
    for part, mask in zip(maps.split(4), masks.split(4), strict=True):
        metric.update(part, mask)
    result = metric.compute()[0]
    for name, value in second_opinion(maps, masks).items():
        assert result.metrics[name] == pytest.approx(value, abs=2e-4), name
        low, high = result.bounds[name]
        assert low <= value <= high
        assert high - low < 2e-3


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
def test_metrics_of_smooth_maps_in_0_to_1_are_right_to_1e_5(fine: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    masks = torch.zeros(32, 160, 160, dtype=torch.bool)
    masks[::2, 20:64, 40:92] = masks[1::4, 90:120, 100:150] = True
    coarse = torch.randn(32, 1, 20, 20, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, (160, 160), mode="bilinear")[:, 0]
    maps = (gaussian_blur(smooth + 3 * masks, 2) - 2).sigmoid()
    streaming, ranking = PixelHistogram(fine=fine), PixelRanking()
    for part, mask in zip(maps.split(8), masks.split(8), strict=True):
        streaming.update(part, mask)
        ranking.update(part, mask)
    result, exact = streaming.compute()[0], ranking.compute()[0].metrics
    for name in ("pixel_auroc", "pixel_pro"):
        assert result.metrics[name] == pytest.approx(exact[name], abs=1e-6)
    for name in ("pixel_ap", "pixel_f1_max"):
        assert result.metrics[name] == pytest.approx(exact[name], abs=1e-5)
    width = max(high - low for low, high in result.bounds.values())
    assert width < (1e-5 if fine else 1e-4)


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


@pytest.mark.slow
@example(49, "normal", 20, False, 0.05)  # fractions whose sum is just above 1
@settings(max_examples=40)
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
    maps, masks = random_maps(seed, kind, count=4, size=66)
    if kind == "very narrow":
        maps = 0.5 + 1e-6 * maps
    masks[0, 0, 0] = True
    expected = pro(maps, masks, pro_steps=steps, fpr_limit=limit)
    result = evaluate(PixelHistogram(pro_steps=steps, fine=fine, fpr_limit=limit), maps, masks)
    value = result.metrics["pixel_pro"]
    if value is None or np.isnan(expected):
        return
    low, high = result.bounds.get("pixel_pro", (value, value))
    assert low - 1e-12 <= expected <= high + 1e-12
    assert low <= value <= high


def test_bounds_of_stepwise_pro_are_narrow_on_smooth_maps() -> None:
    maps, masks = random_maps(5, "probability", count=8, size=128)
    width = []
    for fine in (False, True):
        metric = PixelHistogram(pro_steps=200, fine=fine)
        low, high = evaluate(metric, maps, masks).bounds["pixel_pro"]
        width.append(high - low)
    assert width[1] < width[0] < 2e-3


def test_stepwise_pro_of_half_precision_scores_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        maps, masks = random_maps(6, "normal", count=8, size=32)
        maps = maps.to(dtype)
        expected = pro(maps.double(), masks, pro_steps=200)
        for fine in (False, True):
            result = evaluate(PixelHistogram(pro_steps=200, fine=fine), maps, masks)
            assert result.metrics["pixel_pro"] == pytest.approx(expected, abs=1e-12)
            assert result.bounds == {}


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


def test_scores_of_different_types_are_counted_together() -> None:
    maps, masks = random_maps(0, "normal", count=9, size=80)
    types = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    metric = PixelHistogram()
    for dtype in types:
        metric.update(maps.to(dtype), masks)
    all_maps = torch.cat([maps.to(dtype).float() for dtype in types])
    expected = second_opinion(all_maps, torch.cat([masks] * len(types)))
    assert metric.compute()[0].metrics == pytest.approx(expected, abs=2e-4)


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


def test_reset_inside_inference_mode_and_update_outside() -> None:
    maps, masks = random_maps(0, "normal")
    metric = PixelHistogram()
    with torch.inference_mode():
        metric.update(maps, masks)
        first = metric.compute()[0]
        metric.reset()
    assert evaluate(metric, maps, masks) == first


def test_large_maps() -> None:
    maps = torch.linspace(-1, 1, 4096).expand(1, 4096, 4096)
    masks = torch.zeros(1, 4096, 4096, dtype=torch.bool)
    masks[0, 1000:1010, 4000:] = True
    result = evaluate(PixelHistogram(), maps, masks)
    # Of the normal pixels, 4096 lie in each of the first columns and 4086 in each of the last 96.
    normal = 4096**2 - 960
    expected = (4096 * 4000 + 4086 * 48) / normal
    assert result.metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-9)
    for count in (4096, 4097):  # the latter are more than float32 can count
        constant = PixelHistogram()
        constant.update(
            torch.zeros(1, count, count), torch.zeros(1, count, count, dtype=torch.bool)
        )
        assert num_pixels(constant) == count**2  # all scores share a bin
        assert constant.compute()[0].metrics == dict.fromkeys(PIXEL_METRICS)


def num_pixels(metric: PixelHistogram) -> int:
    """Return the number of pixels of the first row."""
    counted = sum(int(window.counts.sum()) for window in metric._windows(0))
    return counted + int(sum(float(table[:, 2:4].sum()) for table in metric._separate(0)))


def test_anomalous_pixels_and_their_weights() -> None:
    masks = np.zeros((2, 3, 3), bool)
    masks[1, 0, :2] = masks[1, 2, 2] = True
    maps = torch.arange(18.0).view(2, 3, 3)
    for dtype in (torch.float32, torch.float16):
        pixels = pixels_of(maps.to(dtype), defects_of(torch.from_numpy(masks)), (0.0, 17.0))
        assert pixels.weights.tolist() == [0.5, 0.5, 1.0]
        values = pixels.defects.view(np.float16) if dtype == torch.float16 else pixels.defects
        assert values.tolist() == [9, 10, 17]
        assert len(pixels.scores) == 18
    defects = defects_of(torch.from_numpy(masks))
    assert [mask.places.tolist() for mask in defects] == [[], [0, 1, 8]]
    assert [mask.weights.tolist() for mask in defects] == [[], [0.5, 0.5, 1.0]]


@pytest.mark.parametrize("kind", [PixelHistogram, PixelRanking])
def test_defects_may_be_computed_before(kind: Any) -> None:
    maps, masks = random_maps(3, "normal", count=5, size=40)
    rows = torch.tensor([1, 0, 1, 1, 0])
    values = []
    for defects in (None, defects_of(masks)):
        metric = kind(2)
        metric.update(maps, masks, rows, None, defects)
        values.append([result.metrics for result in metric.compute()])
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_that_stay_on_a_device_are_counted_as_those_of_the_cpu(dtype: torch.dtype) -> None:
    maps, masks = random_maps(1, "normal", count=6, size=140)
    masks[2] = False
    half = dtype != torch.float32
    maps = maps.to(dtype)
    extremes = float(maps.min()), float(maps.max())
    expected = pixels_of(maps, defects_of(masks), extremes)
    scores = maps.view(torch.int16).int() & 0xFFFF if half else maps
    pixels = pixels_on_device(scores, defects_of(masks), extremes)
    assert isinstance(pixels.scores, Tensor)
    assert np.array_equal(pixels.scores.numpy(), expected.scores)
    assert np.array_equal(pixels.defects, expected.defects)
    windows = []
    for some in (expected, pixels):
        window = HalfWindow(dtype) if half else LinearWindow.around(*extremes)
        window.count(some)
        windows.append(window)
    for name in ("counts", "positives", "regions"):
        assert np.array_equal(*(getattr(window, name) for window in windows))
    assert windows[0].counts.sum() > len(expected.scores) // 2


def test_states_can_be_merged() -> None:
    maps, masks = random_maps(0, "normal", count=10, size=80)
    whole, left, right = PixelHistogram(), PixelHistogram(), PixelHistogram()
    whole.update(maps, masks)
    left.update(maps[:3], masks[:3])
    right.update(maps[3:], masks[3:])
    left.merge_state(right)
    assert left.compute()[0].metrics == pytest.approx(whole.compute()[0].metrics, abs=1e-5)
    assert num_pixels(left) == maps.numel()
    assert num_pixels(right) == maps[3:].numel()  # the other one is left as it was
    batch = whole(maps[:3], masks[:3])[0]  # adds images and returns their metrics
    alone = evaluate(PixelHistogram(), maps[:3], masks[:3])
    assert batch.metrics == pytest.approx(alone.metrics, abs=1e-12)
    assert num_pixels(whole) == maps.numel() + maps[:3].numel()


@pytest.mark.parametrize("kind", ["normal", "wide", "narrow"])
def test_the_state_does_not_grow_with_the_number_of_images(kind: str) -> None:
    metric = PixelHistogram()
    for seed in range(40):  # every batch has a range of its own
        maps, masks = random_maps(seed, kind, count=2, size=100)
        metric.update(maps * 10.0 ** (seed % 7 - 3), masks)
        assert sum(map(len, metric._separate(0))) <= MAX_SEPARATE[False]
        assert len(metric._linear[0]) <= MAX_WINDOWS
    windows = sum(
        sum(value.nbytes for value in vars(window).values() if isinstance(value, np.ndarray))
        for window in metric._windows(0)
    )
    half = [HalfWindow(dtype) for dtype in (torch.float16, torch.bfloat16)]
    windows += sum(part.counts.nbytes * 3 for part in half)
    assert windows + MAX_SEPARATE[False] * 40 <= 8 * 2**20
    assert num_pixels(metric) == 40 * 2 * 100 * 100
    assert len(metric._separate(0)) > 1  # the largest is left alone, so pixels are merged rarely


def test_two_processes_compute_the_metrics_of_a_single_one(tmp_path: Path) -> None:
    """One of two gloo processes sees a single image, whose scores crowd."""
    maps, masks = process_maps()
    whole = PixelHistogram(pro_steps=50)
    whole.update(maps, masks)
    start_processes(_run_rank, (tmp_path,), nprocs=2, start_method="fork")
    expected = second_opinion(maps, masks) | {"pixel_pro": pro(maps, masks, pro_steps=50)}
    for rank in range(2):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        # The bins differ, and the threshold of the highest F1 may lie inside of one.
        assert metrics == pytest.approx(whole.compute()[0].metrics, abs=1e-4)
        assert metrics == pytest.approx(expected, abs=1e-4)


def process_maps() -> tuple[Tensor, Tensor]:
    """Return ten maps; the scores of the first lie within 1e-5 of each other."""
    maps, masks = random_maps(0, "normal", count=10, size=130)
    maps[0] = 1 + 1e-6 * maps[0]
    return maps, masks


def _run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    maps, masks = process_maps()
    part = slice(0, 1) if rank else slice(1, 10)
    metric = PixelHistogram(pro_steps=50)
    metric.update(maps[part], masks[part])
    (folder / f"{rank}.json").write_text(json.dumps(metric.compute()[0].metrics))
    metric.update(maps[:0], masks[:0])  # restores the counts from before the synchronisation
    assert num_pixels(metric) == maps[part].numel()
    dist.destroy_process_group()


def test_bounds_hold_where_ties_raise_ap() -> None:
    """Anomalous pixels of an inexact bin tie with those of an exact bin from a later batch."""
    for few, many in ((1, 9), (60, 600)):
        maps = torch.linspace(0, 0.3, 2 * 130 * 130).view(2, 130, 130)
        masks = torch.zeros(2, 130, 130, dtype=torch.bool)
        maps[0].view(-1)[:few] = 0.9  # false alarms
        masks[0].view(-1)[50 : 50 + few] = masks[1].view(-1)[50 : 50 + many] = True
        maps[masks] = 0.8
        metric = PixelHistogram()
        for part, mask in zip(maps, masks, strict=True):
            metric.update(part[None], mask[None])
        metrics, bounds, _ = metric.compute()[0]
        for name, value in second_opinion(maps, masks).items():
            low, high = bounds.get(name, (metrics[name],) * 2)
            assert (low or 0) - 1e-12 <= value <= (high or 0) + 1e-12, name


@pytest.mark.parametrize("how", ["forward", "merge"])
def test_the_state_stays_small_when_states_are_merged(how: str) -> None:
    metric = PixelHistogram()
    for seed in range(12):
        maps, masks = random_maps(seed, "normal", count=2, size=130)
        if how == "forward":
            metric(maps, masks)
        else:
            other = PixelHistogram()
            other.update(maps, masks)
            metric.merge_state(other)
    metric.merge_state(PixelHistogram())
    assert sum(map(len, metric._separate(0))) <= MAX_SEPARATE[False]
    assert num_pixels(metric) == 12 * 2 * 130 * 130
