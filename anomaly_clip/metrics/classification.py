"""Classification metrics of torchmetrics, under the names used in the papers' tables."""

from __future__ import annotations

from typing import Literal

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelConfusionMatrix,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

__all__ = ["CONFUSION", "Targets", "class_metrics"]

CONFUSION = "confusion"
"""Name of the confusion matrix."""

Targets = Literal["single", "multi"]
"""``single``: one class per image; ``multi``: several."""


def class_metrics(targets: Targets, count: int) -> MetricCollection:
    """Return the metrics of ``CLASS_METRICS`` and the confusion matrix as one collection.

    Precision, recall and F1 are means over classes. With multi-label targets, a probability above
    0.5 is a positive prediction, and an image is correct if all its labels are (exact match).

    Args:
        targets: single: targets are classes, int64 ``(B,)``; multi: they are zeros and ones,
            ``(B, K)``. Predictions are probabilities ``(B, K)``.
        count: Number of classes.

    Example:
        >>> import torch
        >>> from anomaly_clip.metrics.classification import class_metrics
        >>> metrics = class_metrics("single", 2)
        >>> metrics.update(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        >>> {name: float(metrics.compute()[name]) for name in ("accuracy", "precision")}
        {'accuracy': 0.5, 'precision': 0.25}
    """
    if targets == "single":
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "precision": MulticlassPrecision(count, average="macro"),
                "recall": MulticlassRecall(count, average="macro"),
                "f1": MulticlassF1Score(count, average="macro"),
                CONFUSION: MulticlassConfusionMatrix(count),
            }
        )
    return MetricCollection(
        {
            "accuracy": MultilabelExactMatch(count),
            "precision": MultilabelPrecision(count, average="macro"),
            "recall": MultilabelRecall(count, average="macro"),
            "f1": MultilabelF1Score(count, average="macro"),
            CONFUSION: MultilabelConfusionMatrix(count),
        }
    )
