"""Tests of the options of calibration."""

from __future__ import annotations

from typing import Any

import pytest

from anomaly_clip.commands.calibration_options import check_calibration_options
from anomaly_clip.errors import UserError

CALIBRATED: dict[str, Any] = {"calibrate": True, "calibration": {"folds": None}}
PLAIN: dict[str, Any] = {"calibrate": False, "calibration": {"folds": None}}


@pytest.mark.parametrize(
    ("verb", "typed", "config", "message"),
    [
        ("test", ["--calibrate", "true"], CALIBRATED, "--calibrate is an option of fit"),
        ("predict", ["--calibrate=true"], CALIBRATED, "use anomaly_clip calibrate"),
        ("test", ["--calibration.folds=5"], PLAIN, "not of test"),
        ("fit", ["--calibration.alpha", "0.1"], PLAIN, r"--calibration.alpha has no effect"),
        ("fit", [], {"calibrate": False, "calibration": {"folds": 5}}, "folds has no effect"),
    ],
)
def test_options_without_effect_are_refused(
    verb: str, typed: list[str], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_calibration_options(verb, typed, config)


@pytest.mark.parametrize(
    ("verb", "typed", "config"),
    [
        ("test", ["--ckpt_path", "x"], CALIBRATED),  # the configuration of a calibrated fit
        ("test", ["--calibration.alpha", "0.1"], PLAIN),
        ("fit", ["--calibrate", "true", "--calibration.folds", "5"], CALIBRATED),
        ("fit", [], PLAIN),
        ("predict", ["--calibrate", "false"], PLAIN),
    ],
)
def test_others_pass(verb: str, typed: list[str], config: dict[str, Any]) -> None:
    check_calibration_options(verb, typed, config)
