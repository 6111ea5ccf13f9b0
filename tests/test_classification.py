"""Classification metrics compared with scikit-learn, which computed the papers' tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from anomaly_clip.metric_values import CLASS_METRICS
from anomaly_clip.metrics.classification import CONFUSION, class_metrics


def test_single_targets_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet(np.ones(3), 60))
    target = rng.integers(0, 3, 60)
    metrics = class_metrics("single", 3)
    for part in range(3):  # in three batches
        batch = slice(20 * part, 20 * part + 20)
        metrics.update(probabilities[batch], torch.from_numpy(target[batch]))
    values = metrics.compute()
    predicted = probabilities.argmax(dim=1).numpy()
    means = precision_recall_fscore_support(target, predicted, average="macro")[:3]
    expected = (accuracy_score(target, predicted), *means)
    assert [float(values[name]) for name in CLASS_METRICS] == pytest.approx(expected)
    assert values[CONFUSION].tolist() == confusion_matrix(target, predicted).tolist()


def test_multi_targets_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    probabilities, target = rng.random((50, 4)), rng.integers(0, 2, (50, 4))
    metrics = class_metrics("multi", 4)
    metrics.update(torch.from_numpy(probabilities), torch.from_numpy(target))
    values = metrics.compute()
    predicted = (probabilities > 0.5).astype(int)
    means = precision_recall_fscore_support(target, predicted, average="macro")[:3]
    expected = ((predicted == target).all(axis=1).mean(), *means)
    assert [float(values[name]) for name in CLASS_METRICS] == pytest.approx(expected)
    assert values[CONFUSION].shape == (4, 2, 2)


def test_a_class_that_never_occurs_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(6), 50)
    probabilities[:, 5] = 0  # never predicted
    target = rng.integers(1, 6, 50)  # class 0 does not occur
    metrics = class_metrics("single", 6)
    for part in np.array_split(np.arange(50), 3):
        metrics.update(torch.tensor(probabilities[part]), torch.tensor(target[part]))
    values = metrics.compute()
    predicted = probabilities.argmax(1)
    expected = precision_recall_fscore_support(target, predicted, average="macro", zero_division=0)
    assert values["accuracy"] == pytest.approx(accuracy_score(target, predicted))
    for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert values[name] == pytest.approx(value)
    np.testing.assert_array_equal(
        values["confusion"], confusion_matrix(target, predicted, labels=range(6))
    )


def test_a_label_that_never_occurs_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target = rng.random((60, 8)) < 0.4
    probabilities = np.where(rng.random((60, 8)) < 0.8, target, ~target) * 0.7 + 0.1
    target[:, 2] = False  # a label that does not occur
    metrics = class_metrics("multi", 8)
    metrics.update(torch.tensor(probabilities), torch.tensor(target).long())
    values = metrics.compute()
    predicted = probabilities > 0.5
    expected = precision_recall_fscore_support(target, predicted, average="macro", zero_division=0)
    assert values["accuracy"] == pytest.approx(accuracy_score(target, predicted))  # exact match
    for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        assert values[name] == pytest.approx(value)
    np.testing.assert_array_equal(
        values["confusion"], multilabel_confusion_matrix(target, predicted)
    )
