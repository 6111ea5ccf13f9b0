"""Cross-conformal p-values, their bound, and the pooled scores of folds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly_clip.decisions.conformal import p_values
from anomaly_clip.decisions.cross_conformal import cross_p_values, pooled, proven_rate

FOLDS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=2, max_size=4)


@given(FOLDS, st.data())
def test_p_values_follow_the_definition(folds: list[list[int]], data: st.DataObject) -> None:
    row = st.lists(st.integers(-1, 6), min_size=len(folds), max_size=len(folds))
    scores = data.draw(st.lists(row, min_size=1, max_size=3))
    n = sum(map(len, folds))
    expected = [
        (1 + sum(score >= new for fold, new in zip(folds, image, strict=True) for score in fold))
        / (n + 1)
        for image in scores
    ]
    p = cross_p_values(scores, folds)
    assert p.tolist() == expected
    # The identity that the bound rests on: a mean of p-values, weighted by sizes plus one.
    weights = [len(fold) + 1 for fold in folds]
    columns = [p_values(c, f) for c, f in zip(np.transpose(scores), folds, strict=True)]
    mean = np.average(columns, axis=0, weights=weights)
    assert p == pytest.approx(((n + len(folds)) * mean - len(folds) + 1) / (n + 1))


def test_with_equal_models_they_are_split_conformal_p_values() -> None:
    rng = np.random.default_rng(0)
    folds = [rng.normal(size=size) for size in (5, 7, 8)]
    new = rng.normal(size=30)
    expected = p_values(new, np.concatenate(folds))
    assert cross_p_values(np.tile(new[:, None], 3), folds) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "num_folds"), [(40, 5), (100, 10), (20, 20)])
def test_the_bound_is_the_published_one(n: int, num_folds: int) -> None:
    alpha = 0.05
    extra = 2 * (1 - alpha) * (num_folds - 1) / (n + num_folds)
    assert proven_rate(alpha, n, num_folds) == pytest.approx(min(1, 2 * alpha + extra))


def test_the_false_alarm_rate_of_means_is_close_to_alpha_and_below_the_bound() -> None:
    """The model is the mean of its training scores, and an image's score its distance."""
    rng = np.random.default_rng(0)
    rounds, n, num_folds, alpha = 4000, 20, 5, 0.1
    images = rng.normal(size=(rounds, n))
    new = rng.normal(size=rounds)
    of_fold = np.arange(n) % num_folds
    p = np.zeros(rounds)
    for number in range(rounds):
        means = [images[number, of_fold != fold].mean() for fold in range(num_folds)]
        folds = [abs(images[number, of_fold == k] - mean) for k, mean in enumerate(means)]
        p[number] = cross_p_values([[abs(new[number] - mean) for mean in means]], folds)[0]
    rate = (p <= alpha).mean()
    assert rate <= proven_rate(alpha, n, num_folds)
    assert rate == pytest.approx(2 / 21, abs=0.02)  # floor(0.1 * 21) / 21


@pytest.mark.parametrize(
    ("scores", "folds", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], "expected numbers, and 1 columns"),
        ([[1.0, np.nan]], [[1.0], [2.0]], "expected numbers, and 2 columns"),
        ([[1.0, 2.0]], [[1.0], []], "fold 2 of 2: expected one or more numbers"),
        ([[1.0, 2.0]], [[np.nan], [1.0]], "fold 1 of 2"),
    ],
)
def test_wrong_scores_are_refused(scores: list, folds: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_p_values(scores, folds)


@pytest.mark.parametrize(("n", "num_folds"), [(10, 1), (10, 11), (10, 0)])
def test_the_bound_needs_folds(n: int, num_folds: int) -> None:
    with pytest.raises(ValueError, match="number of folds must be in"):
        proven_rate(0.05, n, num_folds)


def test_the_pooled_scores_promise_nothing() -> None:
    record = pooled([[3.0, 1.0], [2.0]], 0.5, ["a", "b", "c"], "plank")
    assert record.scores == (1.0, 2.0, 3.0)
    assert record.kind == "cross_validation"
    assert (record.map_threshold, record.images, record.words) == (0.5, ("a", "b", "c"), "plank")
    for folds in ([[1.0]], [[1.0], []], [[1.0], [np.inf]]):
        with pytest.raises(ValueError, match=r"fold|finite"):
            pooled(folds)
