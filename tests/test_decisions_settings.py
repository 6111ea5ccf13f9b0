"""Options of calibration."""

from __future__ import annotations

from typing import Any

import pytest

from anomaly_clip.decisions.settings import CalibrationSettings


def test_the_first_of_several_rates_decides() -> None:
    assert CalibrationSettings().alphas == [0.05]
    assert CalibrationSettings(0.01).alphas == [0.01]
    assert CalibrationSettings([0.01, 0.1]).alphas == [0.01, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, r"calibration.alpha must be in \(0, 1\), got 0"),
        ({"alpha": 1.0}, r"calibration.alpha must be in \(0, 1\), got 1.0"),
        ({"alpha": [0.05, 5]}, r"calibration.alpha must be in \(0, 1\), got 5"),
        ({"alpha": float("nan")}, "calibration.alpha must be in"),
        ({"alpha": []}, r"calibration.alpha is \[\]: give one or more distinct rates"),
        ({"alpha": [0.05, 0.05]}, "distinct rates"),
        ({"confidence": 0}, r"calibration.confidence must be in \(0, 1\), got 0"),
        ({"confidence": 95}, r"calibration.confidence must be in \(0, 1\), got 95"),
        ({"folds": 1}, "calibration.folds must be 2 or more, got 1"),
        ({"map_percentile": -1}, r"calibration.map_percentile must be in \[0, 100\), got -1"),
        ({"map_percentile": 100}, r"calibration.map_percentile must be in \[0, 100\), got 100"),
        ({"seed": -1}, "calibration.seed must be 0 or more, got -1"),
    ],
)
def test_values_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationSettings(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"alpha": 1e-6}, {"confidence": 0.999}, {"folds": 2}, {"map_percentile": 0}, {"seed": 7}],
)
def test_values_at_the_limits_are_taken(arguments: dict[str, Any]) -> None:
    settings = CalibrationSettings(**arguments)
    assert {name: getattr(settings, name) for name in arguments} == arguments
