from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.parity import (
    BOUNDS,
    Difference,
    batches_of,
    check_difference,
    compare,
    decision_scores,
    outputs_of,
    tolerance_of,
)

IMAGES = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=1)


def program(**errors: float) -> Any:
    """Return a program whose outputs differ by given values at the image with the value 3."""

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        value = images[:, 0, 0, 0].astype(np.float32)
        outputs = {
            "image_score": 10 * value,
            "anomaly_map": value[:, None, None] - np.full((1, 2, 2), 2, dtype=np.float32),
            "score_parts": np.stack([value, 100 * value], axis=1),
        }
        for name, error in errors.items():
            outputs[name][value == 3] += np.float32(error)
        return outputs

    return run


EXPECTED = outputs_of(program(), IMAGES, 5)


def test_batches_are_of_one_three_and_all() -> None:
    assert [batches_of(n) for n in (2, 3, 4, 8)] == [[1, 2], [1, 3], [1, 3, 4], [1, 3, 8]]


def test_outputs_do_not_depend_on_the_batch_size() -> None:
    sizes: list[int] = []

    def run(images: np.ndarray) -> Any:
        sizes.append(len(images))
        return program()(images)

    for name, values in outputs_of(run, IMAGES, 2).items():
        assert np.array_equal(values, EXPECTED[name])
    assert sizes == [2, 2, 1]


def test_differences_are_shares_of_the_range_or_of_the_largest_value() -> None:
    errors = {"image_score": 4.0, "anomaly_map": -1.0, "score_parts": 2.0}
    difference = compare(EXPECTED, program(**errors), IMAGES, [1, 3, 5])
    assert difference.image_score == pytest.approx(4 / 40)
    assert difference.anomaly_map == pytest.approx(1 / 4)  # maps range from -2 to 2
    assert difference.score_parts == pytest.approx(2 / 4)  # the second part is larger
    assert difference.flips is None
    assert compare(EXPECTED, program(), IMAGES, [3]) == Difference(0.0, 0.0, 0.0)


def test_an_output_of_another_shape_or_without_a_value_differs_without_bound() -> None:
    assert compare(EXPECTED, program(image_score=np.nan), IMAGES, [5]).image_score == np.inf

    def short(images: np.ndarray) -> Any:
        return {**program()(images), "anomaly_map": np.zeros((len(images), 1, 1), np.float32)}

    assert compare(EXPECTED, short, IMAGES, [5]).anomaly_map == np.inf


def test_constant_maps_are_compared_with_their_value() -> None:
    flat = {**EXPECTED, "anomaly_map": np.full((5, 2, 2), 4.0, np.float32)}

    def run(images: np.ndarray) -> Any:
        maps = np.full((len(images), 2, 2), 4.0, np.float32)
        maps[-1, 0, 0] += np.float32(1e-3)
        return {**program()(images), "anomaly_map": maps}

    assert compare(flat, run, IMAGES, [5]).anomaly_map == pytest.approx(2.5e-4, rel=1e-3)


def test_flips_are_counted_per_image() -> None:
    record = CategoryCalibration((0.0, 20.0))
    for error, flips in ((0.0, 0), (-9.0, 0), (-10.0, 1), (-30.0, 1)):
        run = program(image_score=error)  # of 30, next to the threshold of 20
        assert compare(EXPECTED, run, IMAGES, [1, 5], record, 20.0).flips == flips


def test_the_image_of_the_threshold_stays_normal_if_it_is_rounded_up() -> None:
    record = CategoryCalibration((10.0, 30.0))
    assert tolerance_of(record) == pytest.approx(3e-4)
    for error, flips in ((1e-4, 0), (1e-3, 1)):
        run = program(image_score=error)
        assert compare(EXPECTED, run, IMAGES, [5], record, 30.0).flips == flips


def test_decisions_are_by_scaled_parts_if_a_calibration_has_their_ranges() -> None:
    assert decision_scores(EXPECTED, ((0.0, 2.0), (100.0, 200.0))).tolist() == [
        -1.0,
        0.5,
        2.0,
        3.5,
        5.0,
    ]
    assert decision_scores(EXPECTED, None).tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("name", BOUNDS)
def test_a_program_beyond_a_bound_is_refused(name: str) -> None:
    values: dict[str, Any] = {"image_score": 0.0, "anomaly_map": 0.0, "score_parts": 0.0}
    check_difference(Difference(**{**values, name: BOUNDS[name]}), "the program")
    for value in (BOUNDS[name] * 1.01, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"the program differs from torch: {name} by"):
            check_difference(Difference(**{**values, name: value}), "the program")


def test_a_method_without_maps_and_parts_is_described_without_them() -> None:
    text = Difference(2e-7, flips=1).describe(8)
    assert text == "scores by 2.0e-07; 1 of 8 decisions differ"
    assert "no decisions to compare" in Difference(0.0, 1e-6).describe(1)
