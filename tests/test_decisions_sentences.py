"""Guarantees in plain English."""

from __future__ import annotations

import pytest

from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.sentences import guarantee, percent

GUARANTEES = {
    (40, 0.05, None): "With these 40 calibration images, at most 5 % false alarms are expected on "
    "average; 11.3 % is guaranteed with 95 % confidence. A 1 % guarantee needs 299.",
    (19, 0.05, None): "With these 19 calibration images, at most 5 % false alarms are expected on "
    "average; 14.6 % is guaranteed with 95 % confidence. A 1 % guarantee needs 299.",
    (12, 0.05, None): "With these 12 calibration images, 5 % false alarms cannot be had: 7.7 % is "
    "the smallest rate on average; 22.1 % is guaranteed with 95 % confidence. 5 % needs 19.",
    (1, 0.05, None): "With this one calibration image, 5 % false alarms cannot be had: 50 % is the "
    "smallest rate on average; 95 % is guaranteed with 95 % confidence. 5 % needs 19.",
    (40, 0.05, 0.95): "With these 40 calibration images, 5 % false alarms cannot be guaranteed "
    "with 95 % confidence: 7.2 % is the smallest rate; 2.4 % is expected on average. 5 % needs 59.",
    (100, 0.05, 0.95): "With these 100 calibration images, at most 5 % false alarms are guaranteed "
    "with 95 % confidence; 2 % is expected on average. A 1 % guarantee needs 299.",
    (300, 0.05, 0.999): "With these 300 calibration images, at most 5 % false alarms are "
    "guaranteed with 99.9 % confidence; 1.7 % is expected on average. A 1 % guarantee needs 688.",
    (98, 0.0101, None): "With these 98 calibration images, 1.01 % false alarms cannot be had: "
    "1.0101 % is the smallest rate on average; 3 % is guaranteed with 95 % confidence. "
    "1.01 % needs 99.",
    (300, 0.001, None): "With these 300 calibration images, 0.1 % false alarms cannot be had: "
    "0.33 % is the smallest rate on average; 0.99 % is guaranteed with 95 % confidence. "
    "0.1 % needs 999.",
    (1000, 0.001, None): "With these 1,000 calibration images, at most 0.1 % false alarms are "
    "expected on average; 0.3 % is guaranteed with 95 % confidence.",
    (300, 0.01, None): "With these 300 calibration images, at most 1 % false alarms are expected "
    "on average; 2.1 % is guaranteed with 95 % confidence. A 0.1 % guarantee needs 2,995.",
    (3000, 0.05, None): "With these 3,000 calibration images, at most 5 % false alarms are "
    "expected on average; 5.7 % is guaranteed with 95 % confidence.",
}


@pytest.mark.parametrize("case", GUARANTEES, ids=str)
def test_the_guarantee_of_a_split(case: tuple[int, float, float | None]) -> None:
    n, alpha, confidence = case
    record = CategoryCalibration(tuple(range(n)))
    assert guarantee(record, record.level(alpha, confidence)) == GUARANTEES[case]


ESTIMATES = {
    (40, 0.05, None): "Estimated by cross-validation on these 40 images: 5 % false alarms. This is "
    "no guarantee.",
    (12, 0.05, None): "Estimated by cross-validation on these 12 images: 7.7 % false alarms, the "
    "smallest rate; 5 % needs 19. This is no guarantee.",
    (1, 0.5, None): "Estimated by cross-validation on this one image: 50 % false alarms. This is "
    "no guarantee.",
    (100, 0.05, 0.95): "Estimated by cross-validation on these 100 images: 2 % false alarms. This "
    "is no guarantee.",
}


@pytest.mark.parametrize("case", ESTIMATES, ids=str)
def test_cross_validation_promises_nothing(case: tuple[int, float, float | None]) -> None:
    n, alpha, confidence = case
    record = CategoryCalibration(tuple(range(n)), kind="cross_validation")
    text = guarantee(record, record.level(alpha, confidence))
    assert text == ESTIMATES[case]
    assert "guaranteed" not in text
    assert "confidence" not in text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0 %"), (1.0, "100 %"), (0.1, "10 %"), (0.05, "5 %"), (0.0251, "2.5 %"),
        (0.001, "0.1 %"), (0.00049, "0.049 %"), (1e-6, "0.0001 %"), (0.999999, "100 %"),
        (0.00999, "1 %"), (1 / 3, "33.3 %"),
    ],
)  # fmt: skip
def test_percents_have_no_needless_zeros(rate: float, text: str) -> None:
    assert percent(rate) == text
