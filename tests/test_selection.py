from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import f1_score

from anomaly_clip.results.map_store import Rows
from anomaly_clip.results.selection import (
    MAX_PER_KIND,
    best_threshold,
    decided_score,
    select_images,
)


def rows(scores: list[float], labels: list[int | None], category: str = "nut") -> Rows:
    return {
        index: {"category": category, "label": label, "image_score": score}
        for index, (score, label) in enumerate(zip(scores, labels, strict=True))
    }


def images_by_kind(listing: Rows) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for selected in select_images(listing):
        kinds.setdefault(selected.kind, []).append(selected.image)
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


def test_the_worst_images_come_first_and_none_twice() -> None:
    scores = [0.9, 0.1, 0.2, 0.3, 0.15, 0.05, 0.8, 0.7, 0.95, 1.0]
    labels: list[int | None] = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    by_kind = images_by_kind(rows(scores, labels))
    assert by_kind == {"false_alarm": [0, 3, 2, 4, 1], "miss": [5, 7, 6], "hit": [9, 8]}


def test_without_anomalous_images_all_are_false_alarms() -> None:
    assert images_by_kind(rows([0.1, 0.3, 0.2], [0, 0, 0])) == {"false_alarm": [1, 2, 0]}


def test_images_without_labels_are_shown_from_the_top_and_the_middle() -> None:
    by_kind = images_by_kind(rows([float(number) for number in range(20)], [None] * 20))
    assert by_kind == {"high": list(range(19, 7, -1)), "usual": [5, 4, 3, 2]}


def test_images_of_equal_scores_are_selected_once() -> None:
    selected = select_images(rows([0.5] * 6, [0, 0, 0, 1, 1, 1]))
    assert len({image.image for image in selected}) == len(selected)
    assert all(np.isfinite(image.gap) for image in selected)


def test_the_worst_of_thousands_of_categories_come_first() -> None:
    many: Rows = {}
    for number in range(3000):
        low, high = (0.0, 1.0) if number != 1234 else (1.0, 0.0)  # one category is swapped
        for label, score in ((0, low), (1, high), (1, 0.9)):
            row = {"category": f"c{number}", "label": label, "image_score": score}
            many[len(many)] = row
    selected = select_images(many)
    assert max(Counter(image.kind for image in selected).values()) <= MAX_PER_KIND
    assert many[selected[0].image]["category"] == "c1234"
    assert selected[0].kind == "false_alarm"


def test_gaps_by_hand() -> None:
    """The best threshold is 0.2, halfway between 0 and 0.4: one false positive, no miss."""
    selected = select_images(rows([0.0, 2.0, 0.4, 1.2], [0, 1, 1, 0]))
    gaps = {(image.kind, image.image): image.gap for image in selected}
    expected = {("false_alarm", 3): 0.5, ("false_alarm", 0): -0.1, ("miss", 2): -0.1}
    assert gaps == pytest.approx({**expected, ("hit", 1): 0.9})
    # Without anomalous images, gaps are measured from the highest score.
    normal = select_images(rows([0.1, 0.3, 0.2], [0, 0, 0]))
    assert [image.gap for image in normal] == pytest.approx([0, -0.5, -1])
    # Without labels, the gap is the score itself.
    unknown = select_images(rows([0.5, 3.0, 1.0], [None] * 3))
    assert {image.image: image.gap for image in unknown} == {0: 0.5, 1: 3.0, 2: 1.0}


def test_images_are_selected_by_their_decisions() -> None:
    """Of 16 images, 15 to 13 are anomalous; of the normal ones, 2 and 9 have marked pixels."""
    listing = rows([float(number) for number in range(16)], [None] * 16)
    for index, row in listing.items():
        row["decision"] = "anomalous" if index > 12 else "normal"
    selected = select_images(listing, {"nut": 12.5}, {2, 9, 15}, by_decision=True)
    kinds: dict[str, list[int]] = {}
    for image in selected:
        kinds.setdefault(image.kind, []).append(image.image)
    assert kinds["anomalous"] == [15, 14, 13]
    assert kinds["marked"] == [9, 2]
    assert kinds["closest"] == [12, 11, 10, 8, 7, 6, 5, 4, 3, 1, 0]
    gaps = {image.image: image.gap for image in selected}
    assert (gaps[15], gaps[12]) == pytest.approx((2.5 / 15, -0.5 / 15))
    # In a test, the labels matter, and the calibrated threshold gives the distances.
    for index, row in listing.items():
        row["label"] = int(index > 7)
    gaps = {image.image: image.gap for image in select_images(listing, {"nut": 12.5}, {2})}
    assert (gaps[7], gaps[8]) == pytest.approx((-5.5 / 15, 4.5 / 15))


def test_a_category_without_decisions_is_selected_by_scores() -> None:
    selected = select_images(rows([1.0, 2.0], [None] * 2), by_decision=True)
    assert {image.kind for image in selected} == {"high"}


def test_the_decision_score_decides() -> None:
    assert decided_score({"image_score": 1.0, "decision_score": 3.0}) == 3.0
    assert decided_score({"image_score": 1.0}) == 1.0
    assert decided_score({"image_score": 1.0, "decision_score": None}) == 1.0


def test_more_anomalous_images_are_selected_than_normal_ones() -> None:
    listing = rows([float(number) for number in range(200)], [None] * 200)
    for index, row in listing.items():
        row["decision"] = "anomalous" if index >= 100 else "normal"
    kinds = Counter(image.kind for image in select_images(listing, {}, (), by_decision=True))
    assert kinds == {"anomalous": MAX_PER_KIND, "closest": 12}
