"""Which images of a run are worth looking at, and from which score on one is called anomalous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from anomaly_clip.results.map_store import Rows

__all__ = ["KINDS", "Chosen", "Kind", "best_threshold", "choose"]

Kind = Literal["false_alarm", "miss", "hit", "high", "usual"]
KINDS: Mapping[Kind, str] = {
    "false_alarm": "Normal images with the highest scores: the worst false alarms first",
    "miss": "Anomalous images with the lowest scores: the worst misses first",
    "hit": "Typical hits: anomalous images with scores about the middle",
    "high": "The highest scores",
    "usual": "Usual scores: images about the middle",
}
"""Why an image was chosen; the last two are of images without labels."""

OF_A_CATEGORY = 12
"""Images of a kind that are chosen in one category, at most."""
OF_A_KIND = 60
"""In all categories, at most."""


class Chosen(NamedTuple):
    """One image."""

    image: int
    """Its row in the data set's listing."""
    kind: Kind
    gap: float
    """How far it is on the wrong side of its category's threshold, in units of the range of the
    category's scores; what is worst comes first."""


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
    found = np.bincount(place[labels], minlength=len(values))[::-1].cumsum()[::-1]
    false = np.bincount(place[~labels], minlength=len(values))[::-1].cumsum()[::-1]
    best = int(np.argmax(2 * found / (found + false + labels.sum())))
    return float(values[best] if best == 0 else (values[best] + values[best - 1]) / 2)


def choose(rows: Rows) -> list[Chosen]:
    """Choose images of every category and kind; of very many categories, the worst of all.

    Args:
        rows: What is known of the images, by index.

    Returns:
        By kind, the worst first; no image twice.
    """
    by_category: dict[str, list[int]] = {}
    for index, row in rows.items():
        by_category.setdefault(row["category"], []).append(index)
    count = min(OF_A_CATEGORY, max(1, OF_A_KIND // max(1, len(by_category))))
    found: list[Chosen] = []
    for members in by_category.values():
        found += _of_category(rows, members, count)
    kept: list[Chosen] = []
    for kind in KINDS:
        of_kind = sorted((one for one in found if one.kind == kind), key=lambda one: -one.gap)
        kept += of_kind[:OF_A_KIND]
    return kept


def _of_category(rows: Rows, members: Sequence[int], count: int) -> list[Chosen]:
    ranked = sorted(members, key=lambda index: rows[index]["image_score"])
    scores = {index: rows[index]["image_score"] for index in members}
    width = (scores[ranked[-1]] - scores[ranked[0]]) or 1.0
    if any(rows[index]["label"] is None for index in members):
        high = ranked[::-1][:count]
        rest = ranked[: len(ranked) - len(high)]
        return [
            *(Chosen(i, "high", scores[i]) for i in high),
            *(Chosen(i, "usual", scores[i]) for i in _middle(rest, min(count, len(rest) // 2))),
        ]
    labels = [bool(rows[index]["label"]) for index in members]
    threshold = best_threshold([scores[index] for index in members], labels)
    normal = [index for index in ranked if not rows[index]["label"]]
    anomalous = [index for index in ranked if rows[index]["label"]]
    # Half of them at most, so that hits are left where there are few.
    misses = anomalous[: min(count, (len(anomalous) + 1) // 2)]
    hits = [i for i in anomalous[len(misses) :] if threshold is None or scores[i] >= threshold]
    level = scores[ranked[-1]] if threshold is None else threshold
    return [
        *(Chosen(i, "false_alarm", (scores[i] - level) / width) for i in normal[::-1][:count]),
        *(Chosen(i, "miss", (level - scores[i]) / width) for i in misses),
        *(Chosen(i, "hit", (scores[i] - level) / width) for i in _middle(hits, count)),
    ]


def _middle(ranked: Sequence[int], count: int) -> Sequence[int]:
    start = max(0, (len(ranked) - count) // 2)
    return ranked[start : start + count]
