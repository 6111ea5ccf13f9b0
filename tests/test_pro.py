from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.ndimage import label as label_regions

from anomaly_clip.metrics import pro
from anomaly_clip.metrics.pro import region_weights

EIGHT = np.ones((3, 3))


def overlap_curve(
    maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return false positive rate and mean overlap above each threshold, pixel by pixel."""
    regions = []
    for number, mask in enumerate(masks):
        labels, count = label_regions(mask, EIGHT)
        regions += [(number, labels == region) for region in range(1, count + 1)]
    fpr, overlap = [], []
    for threshold in thresholds:
        above = maps > threshold
        fpr.append((above & ~masks).sum() / (~masks).sum())
        overlap.append(np.mean([above[number][region].mean() for number, region in regions]))
    return np.array(fpr), np.array(overlap)


def brute_force_pro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Integrate by trapezoids over all distinct scores, cut at the limit by interpolation."""
    thresholds = np.concatenate([np.unique(maps)[::-1], [-np.inf]])
    fpr, overlap = overlap_curve(maps, masks, thresholds)
    area = 0.0
    for f0, f1, p0, p1 in zip(fpr, fpr[1:], overlap, overlap[1:], strict=False):
        if f0 >= limit:
            break
        stop = min(f1, limit)
        p_stop = p1 if f1 == stop else p0 + (p1 - p0) * (stop - f0) / (f1 - f0)
        area += (stop - f0) * (p0 + p_stop) / 2
    return area / limit


def published_pro(maps: np.ndarray, masks: np.ndarray, limit: float, steps: int) -> float:
    """Compute the stepwise form directly by its definition (docs/metrics.md)."""
    low, high = maps.min(), maps.max()
    fpr, overlap = overlap_curve(maps, masks, np.arange(low, high, (high - low) / steps)[:steps])
    fpr, overlap = fpr[fpr < limit], overlap[fpr < limit]
    fpr = (fpr - fpr.min()) / (fpr.max() - fpr.min())
    return float(trapezoid(overlap[::-1], fpr[::-1]))


def random_case(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 12, 12)) < rng.uniform(0.02, 0.3)
    masks[0, 0, 0], masks[0, 5, 5] = True, False
    maps = rng.integers(0, levels, masks.shape) / levels + 0.3 * masks
    return maps.astype(np.float64), masks


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([2, 7, 10**6]), st.sampled_from([0.05, 0.3, 1.0]))
def test_exact_agrees_with_brute_force(seed: int, levels: int, limit: float) -> None:
    maps, masks = random_case(seed, levels)
    ours = pro(torch.from_numpy(maps), torch.from_numpy(masks), fpr_limit=limit)
    assert ours == pytest.approx(brute_force_pro(maps, masks, limit), abs=1e-9)
    assert 0 <= ours <= 1 + 1e-12


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([20, 200]))
def test_stepwise_agrees_with_its_definition(seed: int, steps: int) -> None:
    maps, masks = random_case(seed, 10**6)
    ours = pro(torch.from_numpy(maps), torch.from_numpy(masks), pro_steps=steps)
    assert ours == pytest.approx(published_pro(maps, masks, 0.3, steps), abs=1e-9)


def test_areas_touching_at_a_corner_are_one_region() -> None:
    mask = np.eye(3, dtype=bool)
    np.testing.assert_allclose(region_weights(mask), [1 / 3] * 3)


def test_every_region_has_the_same_weight() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = True
    mask[3:8, 3:8] = True
    weights = region_weights(mask)
    assert weights.tolist() == pytest.approx([1.0] + [1 / 25] * 25)
    assert len(region_weights(~mask & mask)) == 0


def test_undefined_without_regions_or_normal_pixels() -> None:
    empty = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert math.isnan(pro(torch.rand(2, 4, 4), empty))
    assert math.isnan(pro(torch.rand(2, 4, 4), ~empty))


def test_constant_maps() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    # The curve is the diagonal from (0, 0) to (1, 1): its normalised area up to L is L / 2.
    assert pro(torch.ones(1, 4, 4), mask) == pytest.approx(0.15)
    assert math.isnan(pro(torch.ones(1, 4, 4), mask, pro_steps=200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fpr_limit": 0.0}, "fpr_limit"),
        ({"fpr_limit": 1.5}, "fpr_limit"),
        ({"pro_steps": 1}, "pro_steps"),
    ],
)
def test_invalid_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pro(torch.rand(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), **options)


def test_half_precision_maps_are_accepted() -> None:
    maps, masks = random_case(0, 50)
    for kind in (torch.float16, torch.bfloat16):
        half = torch.from_numpy(maps).to(kind)
        assert pro(half, torch.from_numpy(masks)) == pro(half.float(), torch.from_numpy(masks))


def test_masks_without_a_batch_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="expected masks"):
        pro(torch.rand(2, 2), torch.ones(2, 2, dtype=torch.bool))
