from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from anomaly_clip.metric_values import CURVES
from anomaly_clip.metrics import Evaluator, EvaluatorSettings, average_precision, pro
from anomaly_clip.metrics.curves import NUM_POINTS, image_curves, pixel_curves
from anomaly_clip.records import Batch, Scores


def noise(seed: int, count: int, digits: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    anomalous = rng.random(count) < 0.4
    return (rng.normal(size=count) + anomalous).round(digits).astype(np.float32), anomalous


@pytest.mark.parametrize("digits", [6, 1])
def test_points_lie_on_the_curves_of_scikit_learn(digits: int) -> None:
    scores, anomalous = noise(0, 3000, digits)
    curves = image_curves(scores, anomalous)
    fpr, tpr, _ = roc_curve(anomalous, scores, drop_intermediate=False)
    exact = {(round(x, 5), round(y, 5)) for x, y in zip(fpr, tpr, strict=True)}
    assert set(zip(*curves["image_roc"], strict=True)) <= exact
    precision, recall, _ = precision_recall_curve(anomalous, scores)
    exact = {(round(x, 5), round(y, 5)) for x, y in zip(recall, precision, strict=True)}
    assert set(list(zip(*curves["image_pr"], strict=True))[1:]) <= exact


def test_thinning_keeps_the_areas() -> None:
    scores, anomalous = noise(1, 20_000)
    curves = image_curves(scores, anomalous)
    fpr, tpr, _ = roc_curve(anomalous, scores)
    assert auc(*curves["image_roc"]) == pytest.approx(auc(fpr, tpr), abs=2e-3)
    expected = average_precision(torch.tensor(scores), torch.tensor(anomalous))
    assert auc(*curves["image_pr"]) == pytest.approx(expected, abs=5e-3)
    assert all(len(curve.x) == len(curve.y) <= NUM_POINTS + 1 for curve in curves.values())


def test_a_case_by_hand() -> None:
    # From the highest score down: an anomalous pixel, a normal one, then a tie of one of each.
    curves = pixel_curves(
        np.array([1, 0, 1]), np.array([0, 1, 1]), np.array([0.5, 0.0, 0.5]), fpr_limit=0.75
    )
    assert curves["pixel_roc"] == ([0, 0, 0.5, 1], [0, 0.5, 0.5, 1])
    assert curves["pixel_pr"] == ([0, 0.5, 0.5, 1], [1, 1, 0.5, 0.5])
    assert curves["pixel_pro"] == ([0, 0, 0.5, 0.75], [0, 0.5, 0.5, 0.75])


def test_one_class_has_no_curves() -> None:
    scores = np.arange(4, dtype=np.float32)
    for anomalous in (np.zeros(4, bool), np.ones(4, bool)):
        assert image_curves(scores, anomalous) == {}


@pytest.mark.parametrize("exact", [False, True])
def test_the_evaluator_keeps_the_curves_of_its_metrics(exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 40, 40, dtype=torch.bool)
    masks[3:, 5:15, 8:30] = True
    maps = torch.rand(6, 40, 40, generator=generator) + 0.4 * masks
    evaluator = Evaluator(["a", "b"], EvaluatorSettings(exact=exact))
    batch = Batch(
        image=torch.zeros(6, 3, 1, 1, dtype=torch.uint8),
        label=masks.flatten(1).any(1),
        category=["a"] * 6,
        path=[str(number) for number in range(6)],
        index=torch.arange(6),
        mask=masks,
    )
    evaluator.update(Scores(anomaly_map=maps, image_score=maps.flatten(1).amax(1)), batch)
    metrics = evaluator.compute()["categories"]["a"]
    curves = evaluator.curves
    assert list(curves) == ["a"]
    assert tuple(curves["a"]) == CURVES
    assert auc(*curves["a"]["pixel_roc"]) == pytest.approx(metrics["pixel_auroc"], abs=2e-3)
    assert auc(*curves["a"]["pixel_pr"]) == pytest.approx(metrics["pixel_ap"], abs=1e-2)
    overlap = curves["a"]["pixel_pro"]
    assert overlap.x[-1] == pytest.approx(0.3)
    assert auc(*overlap) / 0.3 == pytest.approx(pro(maps, masks), abs=3e-3)


def test_precision_begins_at_the_first_true_positive() -> None:
    """scikit-learn's curve starts at precision 1, ours at that of the first true positive."""
    scores = np.array([9, 7, 7, 7, 5, 3], np.float32)
    anomalous = np.array([0, 1, 0, 0, 1, 0], bool)
    curve = image_curves(scores, anomalous)["image_pr"]
    precision, recall, _ = precision_recall_curve(anomalous, scores)
    positive = recall > 0
    assert curve.x[0] == 0
    assert curve.y[0] == pytest.approx(precision[positive][-1], abs=1e-5) == 0.25
    assert set(curve.x[1:]) == set(recall[positive])
