"""Selection of a run's most telling images, and the threshold of the highest F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from anomaly_clip.results.map_store import Rows

__all__ = ["HEADINGS_BY_KIND", "Kind", "SelectedImage", "best_threshold", "select_images"]

Kind = Literal["false_alarm", "miss", "hit", "high", "usual"]
HEADINGS_BY_KIND: Mapping[Kind, str] = {
    "false_alarm": "Normal images with the highest scores: the worst false alarms first",
    "miss": "Anomalous images with the lowest scores: the worst misses first",
    "hit": "Typical hits: anomalous images with scores about the middle",
    "high": "The highest scores",
    "usual": "Usual scores: images about the middle",
}
"""Headings by the reason of a selection; the last two are for images without labels."""

MAX_PER_CATEGORY = 12
"""Most images of a kind that are selected in one category."""
MAX_PER_KIND = 60
"""Most images of a kind in all categories together."""


class SelectedImage(NamedTuple):
    """An image that was selected, and the reason."""

    image: int
    """Its row in the data set's listing."""
    kind: Kind
    gap: float
    """Distance to the wrong side of its category's threshold, in units of the range of the
    category's scores; the worst come first."""


def best_threshold(scores: Sequence[float], anomalous: Sequence[bool]) -> float | None:
    """Return the score from which on calling images anomalous gives the highest F1.

    Halfway to the next lower score, so that rounding does not matter. None unless both classes
    occur.

    Example:
        >>> from anomaly_clip.results.selection import best_threshold
        >>> best_threshold([0.1, 0.4, 0.3, 0.8], [False, False, True, True])
        0.2
    """
    labels = np.asarray(anomalous, dtype=bool)
    if not labels.any() or labels.all():
        return None
    values, place = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True)
    # Counts of images at or above each distinct score, (V,).
    hits = np.bincount(place[labels], minlength=len(values))[::-1].cumsum()[::-1]
    false_alarms = np.bincount(place[~labels], minlength=len(values))[::-1].cumsum()[::-1]
    best = int(np.argmax(2 * hits / (hits + false_alarms + labels.sum())))
    return float(values[best] if best == 0 else (values[best] + values[best - 1]) / 2)


def select_images(rows: Rows) -> list[SelectedImage]:
    """Select images of every category and kind; of very many categories, the worst of all.

    Args:
        rows: Category, label and score of the images, by index.

    Returns:
        By kind, the worst first; no image twice.
    """
    by_category: dict[str, list[int]] = {}
    for index, row in rows.items():
        by_category.setdefault(row["category"], []).append(index)
    count = min(MAX_PER_CATEGORY, max(1, MAX_PER_KIND // max(1, len(by_category))))
    candidates: list[SelectedImage] = []
    for members in by_category.values():
        candidates += _select_in_category(rows, members, count)
    selected: list[SelectedImage] = []
    for kind in HEADINGS_BY_KIND:
        of_kind = [image for image in candidates if image.kind == kind]
        selected += sorted(of_kind, key=lambda image: -image.gap)[:MAX_PER_KIND]
    return selected


def _select_in_category(rows: Rows, members: Sequence[int], count: int) -> list[SelectedImage]:
    ranked = sorted(members, key=lambda index: rows[index]["image_score"])
    scores = {index: rows[index]["image_score"] for index in members}
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
    threshold = best_threshold([scores[index] for index in members], labels)
    normal = [index for index in ranked if not rows[index]["label"]]
    anomalous = [index for index in ranked if rows[index]["label"]]
    # Half of them at most, so that hits are left where there are few.
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
