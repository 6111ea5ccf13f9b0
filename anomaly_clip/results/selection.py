"""Selection of a run's most informative images, and the threshold with the highest F1."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from anomaly_clip.results.map_store import Rows

__all__ = [
    "HEADINGS_BY_KIND",
    "Kind",
    "SelectedImage",
    "best_threshold",
    "decided_score",
    "select_images",
]

Kind = Literal["false_alarm", "miss", "hit", "high", "usual", "anomalous", "closest", "marked"]
HEADINGS_BY_KIND: Mapping[Kind, str] = {
    "false_alarm": "Normal images with the highest scores (worst false positives first)",
    "miss": "Anomalous images with the lowest scores (worst false negatives first)",
    "hit": "Typical true positives: anomalous images with scores near the median",
    "high": "Images with the highest scores",
    "usual": "Typical images: scores near the median",
    "anomalous": "Anomalous (highest score first)",
    "closest": "Normal, closest to the threshold",
    "marked": "Normal with marked pixels",
}
"""Headings by the reason for the selection: three for images with labels, two for images without,
and three for decisions."""

MAX_PER_CATEGORY = 12
"""Maximum number of images of one kind selected per category."""
MAX_PER_KIND = 60
"""Maximum number of images of one kind over all categories."""


class SelectedImage(NamedTuple):
    """A selected image, and the reason for its selection."""

    image: int
    """Index of the image in the data set's listing."""
    kind: Kind
    gap: float
    """Sort key, highest first. With labels or a calibration: distance of the score from the
    category's threshold as a fraction of the category's score range; positive for misclassified
    images and for hits, with a calibration for anomalous images. Otherwise the score itself."""


def best_threshold(scores: Sequence[float], anomalous: Sequence[bool]) -> float | None:
    """Return the threshold with the highest F1; images at or above it are classified as anomalous.

    The threshold lies halfway to the next lower score, so that rounding does not matter. It is None
    unless both classes occur.

    Example:
        >>> from anomaly_clip.results.selection import best_threshold
        >>> best_threshold([0.1, 0.4, 0.3, 0.8], [False, False, True, True])
        0.2
    """
    labels = np.asarray(anomalous, dtype=bool)
    if not labels.any() or labels.all():
        return None
    values, rank = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    # Number of images at or above each distinct score, (V,).
    hits = np.bincount(rank[labels], minlength=len(values))[::-1].cumsum()[::-1]
    false_alarms = np.bincount(rank[~labels], minlength=len(values))[::-1].cumsum()[::-1]
    best = int(np.argmax(2 * hits / (hits + false_alarms + labels.sum())))
    return float(values[best] if best == 0 else (values[best] + values[best - 1]) / 2)


def select_images(
    rows: Rows,
    thresholds: Mapping[str, float] = {},
    marked: Collection[int] = (),
    by_decision: bool = False,
) -> list[SelectedImage]:
    """Select images of every category and kind, or the worst overall if there are many categories.

    Args:
        rows: Category, label and score of the images, by index; with a calibration, the decision.
        thresholds: Thresholds of a calibration by category, in place of those with the highest F1.
        marked: Indices of the images with pixels above the map threshold.
        by_decision: Whether to select by the decisions instead of labels; a category without
            decisions is selected as without a calibration.

    Returns:
        Selected images by kind, worst first; each image at most once.
    """
    by_category: dict[str, list[int]] = {}
    for index, row in rows.items():
        by_category.setdefault(row["category"], []).append(index)
    count = min(MAX_PER_CATEGORY, max(1, MAX_PER_KIND // max(1, len(by_category))))
    candidates: list[SelectedImage] = []
    for name, members in by_category.items():
        threshold = thresholds.get(name)
        if by_decision and all(rows[index].get("decision") is not None for index in members):
            most = max(1, MAX_PER_KIND // len(by_category))
            candidates += _select_by_decision(rows, members, most, count, threshold, marked)
        else:
            candidates += _select_in_category(rows, members, count, threshold)
    selected: list[SelectedImage] = []
    for kind in HEADINGS_BY_KIND:
        images_of_kind = [image for image in candidates if image.kind == kind]
        selected += sorted(images_of_kind, key=lambda image: -image.gap)[:MAX_PER_KIND]
    return selected


def decided_score(row: Mapping[str, Any]) -> float:
    """Return the score that decides: of methods with score parts, a test lists it apart."""
    score: float = (
        row["image_score"] if row.get("decision_score") is None else row["decision_score"]
    )
    return score


def _select_by_decision(
    rows: Rows,
    members: Sequence[int],
    most: int,
    count: int,
    threshold: float | None,
    marked: Collection[int],
) -> list[SelectedImage]:
    """Select at most ``most`` anomalous images, and ``count`` normal ones near the threshold.

    Of normal images with marked pixels, ``most`` are selected, too.
    """
    scores = {index: decided_score(rows[index]) for index in members}
    ranked = sorted(members, key=lambda index: -scores[index])
    width = (scores[ranked[0]] - scores[ranked[-1]]) or 1.0
    level = 0.0 if threshold is None else threshold
    gaps = {index: (scores[index] - level) / width for index in members}
    anomalous = [index for index in ranked if rows[index]["decision"] == "anomalous"]
    normal = [index for index in ranked if rows[index]["decision"] != "anomalous"]
    with_marks = [index for index in normal if index in marked][:most]
    without = set(normal).difference(with_marks)
    closest = [index for index in normal if index in without][:count]
    return [
        *(SelectedImage(i, "anomalous", gaps[i]) for i in anomalous[:most]),
        *(SelectedImage(i, "closest", gaps[i]) for i in closest),
        *(SelectedImage(i, "marked", gaps[i]) for i in with_marks),
    ]


def _select_in_category(
    rows: Rows, members: Sequence[int], count: int, threshold: float | None
) -> list[SelectedImage]:
    scores = {index: decided_score(rows[index]) for index in members}
    ranked = sorted(members, key=lambda index: scores[index])
    width = (scores[ranked[-1]] - scores[ranked[0]]) or 1.0
    if any(rows[index]["label"] is None for index in members):
        highest = ranked[::-1][:count]
        rest = ranked[: len(ranked) - len(highest)]
        typical = _middle(rest, min(count, len(rest) // 2))
        return [
            *(SelectedImage(i, "high", scores[i]) for i in highest),
            *(SelectedImage(i, "usual", scores[i]) for i in typical),
        ]
    labels = [bool(rows[index]["label"]) for index in members]
    if threshold is None:
        threshold = best_threshold([scores[index] for index in members], labels)
    normal = [index for index in ranked if not rows[index]["label"]]
    anomalous = [index for index in ranked if rows[index]["label"]]
    # Misses are at most half of the anomalous images, so that some remain as hits.
    misses = anomalous[: min(count, (len(anomalous) + 1) // 2)]
    hits = [i for i in anomalous[len(misses) :] if threshold is None or scores[i] >= threshold]
    level = scores[ranked[-1]] if threshold is None else threshold
    false_alarms, typical_hits = normal[::-1][:count], _middle(hits, count)
    return [
        *(SelectedImage(i, "false_alarm", (scores[i] - level) / width) for i in false_alarms),
        *(SelectedImage(i, "miss", (level - scores[i]) / width) for i in misses),
        *(SelectedImage(i, "hit", (scores[i] - level) / width) for i in typical_hits),
    ]


def _middle(ranked: Sequence[int], count: int) -> Sequence[int]:
    start = max(0, (len(ranked) - count) // 2)
    return ranked[start : start + count]
