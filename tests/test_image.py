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


@pytest.mark.parametrize("figure", [auroc, average_precision, f1_max])
@pytest.mark.parametrize("value", [True, False])
def test_one_class_alone_is_undefined(
    figure: Callable[[torch.Tensor, torch.Tensor], float], value: bool
) -> None:
    assert math.isnan(figure(torch.rand(5), torch.full((5,), value)))


def test_nothing_is_undefined() -> None:
    assert math.isnan(auroc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("scores", "target", "sentence"),
    [
        (torch.rand(3), torch.zeros(4, dtype=torch.bool), "differ in shape"),
        (torch.rand(3), torch.zeros(3), "bool target"),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), "floating scores"),
        (torch.tensor([0.0, math.nan]), torch.tensor([True, False]), "NaN or infinite"),
        (torch.tensor([0.0, math.inf]), torch.tensor([True, False]), "NaN or infinite"),
    ],
)
def test_refuses(scores: torch.Tensor, target: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        auroc(scores, target)
