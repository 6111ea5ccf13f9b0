from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import f1_score

from anomaly_clip.results.map_store import Rows
from anomaly_clip.results.selection import MAX_PER_KIND, best_threshold, select_images


def rows(scores: list[float], labels: list[int | None], category: str = "nut") -> Rows:
    return {
        index: {"category": category, "label": label, "image_score": score}
        for index, (score, label) in enumerate(zip(scores, labels, strict=True))
    }


def named(found: Rows) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for one in select_images(found):
        kinds.setdefault(one.kind, []).append(one.image)
    return kinds


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_f1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random(50) < 0.5
    scores = (rng.normal(size=50) + labels).round(1)
    threshold = best_threshold(scores.tolist(), labels.tolist())
    assert threshold is not None
    best = max(f1_score(labels, scores >= level) for level in np.unique(scores))
    assert f1_score(labels, scores >= threshold) == pytest.approx(best)


def test_one_class_has_no_best_threshold() -> None:
    assert best_threshold([0.1, 0.2], [True, True]) is None
    assert best_threshold([0.1, 0.2], [False, False]) is None


def test_the_worst_come_first_and_none_twice() -> None:
    scores = [0.9, 0.1, 0.2, 0.3, 0.15, 0.05, 0.8, 0.7, 0.95, 1.0]
    labels: list[int | None] = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    found = named(rows(scores, labels))
    assert found == {"false_alarm": [0, 3, 2, 4, 1], "miss": [5, 7, 6], "hit": [9, 8]}


def test_without_anomalous_images_there_are_alarms_only() -> None:
    assert named(rows([0.1, 0.3, 0.2], [0, 0, 0])) == {"false_alarm": [1, 2, 0]}


def test_images_without_labels_are_shown_from_the_top_and_the_middle() -> None:
    found = named(rows([float(number) for number in range(20)], [None] * 20))
    assert found == {"high": list(range(19, 7, -1)), "usual": [5, 4, 3, 2]}


def test_equal_scores_are_no_trouble() -> None:
    found = select_images(rows([0.5] * 6, [0, 0, 0, 1, 1, 1]))
    assert len({one.image for one in found}) == len(found)
    assert all(np.isfinite(one.gap) for one in found)


def test_of_thousands_of_categories_the_worst_are_shown() -> None:
    many: Rows = {}
    for number in range(3000):
        low, high = (0.0, 1.0) if number != 1234 else (1.0, 0.0)  # one is the wrong way round
        for label, score in ((0, low), (1, high), (1, 0.9)):
            row = {"category": f"c{number}", "label": label, "image_score": score}
            many[len(many)] = row
    found = select_images(many)
    assert max(Counter(one.kind for one in found).values()) <= MAX_PER_KIND
    assert many[found[0].image]["category"] == "c1234"
    assert found[0].kind == "false_alarm"


def test_gaps_by_hand() -> None:
    """With the threshold 0.2, halfway below 0.4, F1 is highest: one false alarm, no miss."""
    found = select_images(rows([0.0, 2.0, 0.4, 1.2], [0, 1, 1, 0]))
    gaps = {(one.kind, one.image): one.gap for one in found}
    expected = {("false_alarm", 3): 0.5, ("false_alarm", 0): -0.1, ("miss", 2): -0.1}
    assert gaps == pytest.approx({**expected, ("hit", 1): 0.9})
    # Without anomalous images they are measured from the highest score.
    alone = select_images(rows([0.1, 0.3, 0.2], [0, 0, 0]))
    assert [one.gap for one in alone] == pytest.approx([0, -0.5, -1])
    # Without labels a gap is the score itself.
    unknown = select_images(rows([0.5, 3.0, 1.0], [None] * 3))
    assert {one.image: one.gap for one in unknown} == {0: 0.5, 1: 3.0, 2: 1.0}
