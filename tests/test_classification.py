"""Classification metrics against scikit-learn, which the papers' tables come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from anomaly_clip.metrics.classification import CLASS_FIGURES, CONFUSION, class_metrics


def test_single_targets_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet(np.ones(3), 60))
    target = rng.integers(0, 3, 60)
    metrics = class_metrics("single", 3)
    for part in range(3):  # in three batches
        some = slice(20 * part, 20 * part + 20)
        metrics.update(probabilities[some], torch.from_numpy(target[some]))
    values = metrics.compute()
    predicted = probabilities.argmax(dim=1).numpy()
    means = precision_recall_fscore_support(target, predicted, average="macro")[:3]
    expected = (accuracy_score(target, predicted), *means)
    assert [float(values[name]) for name in CLASS_FIGURES] == pytest.approx(expected)
    assert values[CONFUSION].tolist() == confusion_matrix(target, predicted).tolist()


def test_multi_targets_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    probabilities, target = rng.random((50, 4)), rng.integers(0, 2, (50, 4))
    metrics = class_metrics("multi", 4)
    metrics.update(torch.from_numpy(probabilities), torch.from_numpy(target))
    values = metrics.compute()
    predicted = (probabilities > 0.5).astype(int)
    means = precision_recall_fscore_support(target, predicted, average="macro")[:3]
    expected = ((predicted == target).all(axis=1).mean(), *means)
    assert [float(values[name]) for name in CLASS_FIGURES] == pytest.approx(expected)
    assert values[CONFUSION].shape == (4, 2, 2)
