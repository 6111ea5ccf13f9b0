from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomaly_clip.metrics import auroc, average_precision, f1_max
from anomaly_clip.metrics.image import _rank_on_device, bootstrap_auroc, rank


def sklearn_f1_max(scores: np.ndarray, target: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(target, scores)
    with np.errstate(invalid="ignore"):
        f1 = 2 * precision * recall / (precision + recall)
    return float(np.nanmax(f1))


@given(
    st.integers(2, 400),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 3, 10, 10**6]),
    st.sampled_from([1e-30, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
def test_agrees_with_scikit_learn(
    size: int, share: float, levels: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = ((rng.integers(-levels, levels + 1, size) / levels) * scale).astype(np.float32)
    target = rng.random(size) < share
    target[:2] = [True, False]
    ours = torch.from_numpy(scores), torch.from_numpy(target)
    assert auroc(*ours) == pytest.approx(roc_auc_score(target, scores), abs=1e-9)
    expected = average_precision_score(target, scores)
    assert average_precision(*ours) == pytest.approx(expected, abs=1e-9)
    assert f1_max(*ours) == pytest.approx(sklearn_f1_max(scores, target), abs=1e-9)


def test_constant_scores_by_hand() -> None:
    scores, target = torch.zeros(4), torch.tensor([True, False, False, False])
    assert auroc(scores, target) == 0.5
    assert average_precision(scores, target) == 0.25
    assert f1_max(scores, target) == pytest.approx(2 * 1 / (4 + 1))


def test_perfect_and_reversed() -> None:
    target = torch.tensor([False, False, True])
    assert auroc(target.float(), target) == average_precision(target.float(), target) == 1.0
    assert auroc(-target.float(), target) == 0.0


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max])
@pytest.mark.parametrize("value", [True, False])
def test_a_single_class_is_undefined(
    metric: Callable[[torch.Tensor, torch.Tensor], float], value: bool
) -> None:
    assert math.isnan(metric(torch.rand(5), torch.full((5,), value)))


def test_no_scores_are_undefined() -> None:
    assert math.isnan(auroc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (torch.rand(3), torch.zeros(4, dtype=torch.bool), "differ in shape"),
        (torch.rand(3), torch.zeros(3), "bool target"),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), "floating scores"),
        (torch.tensor([0.0, math.nan]), torch.tensor([True, False]), "NaN or infinite"),
        (torch.tensor([0.0, math.inf]), torch.tensor([True, False]), "NaN or infinite"),
    ],
)
def test_invalid_scores_are_refused(
    scores: torch.Tensor, target: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        auroc(scores, target)


@pytest.mark.parametrize("levels", [2, 50, 10**6])
def test_ranking_for_other_devices_is_the_same(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = torch.from_numpy(rng.integers(0, levels, 500).astype(np.float32))
    target = torch.from_numpy(rng.random(500) < 0.2)
    ours, theirs = rank(scores, target), _rank_on_device(scores, target)
    assert ours.num_normal == theirs.num_normal == int((~target).sum())
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_counts_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 3.0, 2.0])
    target = torch.tensor([False, True, False, False, True])
    ranking = rank(scores, target)
    assert ranking.tied.tolist() == [2]
    assert ranking.above.tolist() == [1]
    assert ranking.at_least.tolist() == [2]
    assert ranking.num_normal == 3


def test_bootstrap_of_separable_and_equal_scores() -> None:
    """In every resample, the AUROC is 1 for separable scores and 1/2 for equal scores."""
    target = torch.arange(40) % 2 == 0
    assert bootstrap_auroc(target.float(), target, 50) == (1.0, 1.0)
    assert bootstrap_auroc(torch.ones(40), target, 50) == (0.5, 0.5)
    low, high = bootstrap_auroc(torch.ones(40), torch.zeros(40, dtype=torch.bool), 5)
    assert math.isnan(low)
    assert math.isnan(high)


def test_bootstrap_has_the_width_of_the_normal_theory() -> None:
    """Hanley and McNeil's standard error of the area (1982) agrees within a few percent."""
    rng = np.random.default_rng(0)
    target = torch.arange(400) % 2 == 0
    scores = torch.from_numpy(rng.normal(size=400)) + target
    area = auroc(scores, target)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + 199 * (q1 - area**2) + 199 * (q2 - area**2)) / 200**2
    low, high = bootstrap_auroc(scores, target, 1000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.15)
