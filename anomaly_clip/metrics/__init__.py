"""Anomaly detection metrics: pure functions, and the evaluator that applies them per category."""

from anomaly_clip.metric_values import METRICS, Results
from anomaly_clip.metrics.evaluator import Evaluator, EvaluatorSettings
from anomaly_clip.metrics.image import auroc, average_precision, f1_max
from anomaly_clip.metrics.pixel import PixelHistogram
from anomaly_clip.metrics.pro import pro
from anomaly_clip.metrics.ranking import PixelRanking

__all__ = [
    "METRICS",
    "Evaluator",
    "EvaluatorSettings",
    "PixelHistogram",
    "PixelRanking",
    "Results",
    "auroc",
    "average_precision",
    "f1_max",
    "pro",
]
