"""Warnings to print next to metrics that would otherwise be misinterpreted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anomaly_clip.records import DEMO

__all__ = [
    "DEMO_REMARK",
    "MARK",
    "RANDOM_WARNING",
    "TRANSDUCTIVE_REMARK",
    "UNCERTAIN_WARNING",
    "WIDE_BOUNDS",
    "overlap_warning",
    "rounds_remark",
    "selection_warning",
    "transductive_remark",
    "uncertain_warning",
    "unreadable_warnings",
    "weights_remark",
]

RANDOM_WARNING = "RANDOM WEIGHTS: these metrics are meaningless"
MARK = "~"
"""Precedes a metric with wide bounds."""
UNCERTAIN_WARNING = (
    f"{MARK} MARKS PIXEL METRICS THAT MAY DIFFER FROM THE EXACT ONES BY MORE THAN 0.1: see the "
    f"bounds in metrics.json (intervals), or rank all pixels with --model.evaluator.exact true"
)
WIDE_BOUNDS = "wide bounds (intervals in metrics.json)"
"""Remark on a metric with wide bounds in machine-readable tables, which have no marks."""
TRANSDUCTIVE_REMARK = (
    "TRANSDUCTIVE: each image is scored by comparison with the other images of its category"
)
"""Remark on metrics that depend on the test images as a whole, as do those of MuSc."""
DEMO_REMARK = "demo weights, trained on generated images only: these metrics are not CLIP's"


def weights_remark(weights: Mapping[str, object]) -> str | None:
    """Return the warning for metrics of untrained or demo weights; None for other weights.

    Args:
        weights: A run's record of its weights, a :class:`~anomaly_clip.records.WeightsRecord`.

    Example:
        >>> from anomaly_clip.results.warnings import weights_remark
        >>> weights_remark({"pretrained": "random", "random": True})
        'RANDOM WEIGHTS: these metrics are meaningless'
        >>> weights_remark({"pretrained": "openai", "random": False})
    """
    if weights.get("random"):
        return RANDOM_WARNING
    return DEMO_REMARK if weights.get("pretrained") == DEMO else None


def selection_warning(protocol: Mapping[str, object]) -> str | None:
    """Return the warning for metrics of an epoch that was selected on the test images."""
    if protocol.get("select") != "best_test":
        return None
    return "EPOCH SELECTED ON THE TEST IMAGES (select best_test): the metrics are too optimistic"


def transductive_remark(protocol: Mapping[str, object]) -> str | None:
    """Return the remark on scores that depend on the other images; None for other scores.

    Example:
        >>> from anomaly_clip.results.warnings import transductive_remark
        >>> transductive_remark({"transductive": True})
        'TRANSDUCTIVE: each image is scored by comparison with the other images of its category'
        >>> transductive_remark({"fitted": False})
    """
    return TRANSDUCTIVE_REMARK if protocol.get("transductive") is True else None


def overlap_warning(protocol: Mapping[str, object]) -> str | None:
    """Return the warning for metrics of images that were fitted on; None without any."""
    number = protocol.get("overlap")
    return f"{number} TEST IMAGES ARE AMONG THE TRAINING IMAGES" if number else None


def unreadable_warnings(protocol: Mapping[str, object]) -> list[str]:
    """Return the warnings for metrics without the images that could not be read.

    Example:
        >>> from anomaly_clip.results.warnings import unreadable_warnings
        >>> unreadable_warnings({"unreadable_images": 1, "fitted_without": 2})
        ['1 IMAGE COULD NOT BE READ', 'FITTED WITHOUT 2 IMAGES THAT COULD NOT BE READ']
    """
    scored, fitted = protocol.get("unreadable_images"), protocol.get("fitted_without")
    warnings = []
    if scored:
        warnings.append(f"{scored} IMAGE{'' if scored == 1 else 'S'} COULD NOT BE READ")
    if fitted:
        images = f"{fitted} IMAGE{'' if fitted == 1 else 'S'}"
        warnings.append(f"FITTED WITHOUT {images} THAT COULD NOT BE READ")
    return warnings


def uncertain_warning(uncertain: Mapping[str, Sequence[str]]) -> str | None:
    """Return the warning for pixel metrics with wide bounds; None without any.

    Args:
        uncertain: Metrics by category; see
            :func:`~anomaly_clip.metrics.evaluator.uncertain_metrics`.
    """
    return UNCERTAIN_WARNING if uncertain else None


def rounds_remark(protocol: Mapping[str, Any]) -> str | None:
    """Describe the number of averaged rounds, and the standard deviation of metrics over them."""
    rounds = protocol.get("rounds") or 1
    if rounds < 2:
        return None
    spread = protocol.get("spread") or {}
    deviations = [
        f"{name.replace('_auroc', '')} AUROC {100 * spread[name]:.1f}"
        for name in ("image_auroc", "pixel_auroc")
        if spread.get(name) is not None
    ]
    suffix = f"; standard deviation of {', '.join(deviations)}" if deviations else ""
    return f"means over {rounds} rounds{suffix}"
