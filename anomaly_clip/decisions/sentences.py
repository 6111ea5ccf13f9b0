"""Guarantees of decisions in plain English."""

from __future__ import annotations

import math
from decimal import Decimal

from anomaly_clip.decisions.calibration import CategoryCalibration, Level
from anomaly_clip.decisions.conformal import CONFIDENCE, normals_needed

__all__ = ["guarantee", "percent"]

LOWER_RATES = (0.01, 0.001)
"""Rates that a message names the number of images for, if there are too few."""
MAX_DIGITS = 12
"""Digits of a rate that was typed."""


def percent(rate: float) -> str:
    """Return a computed rate in percent: one decimal, or two digits below 1 %.

    Example:
        >>> from anomaly_clip.decisions.sentences import percent
        >>> [percent(rate) for rate in (0.05, 0.11319, 0.001, 0.00012345, 0.99999, 0.0)]
        ['5 %', '11.3 %', '0.1 %', '0.012 %', '100 %', '0 %']
    """
    return _percent(rate, 0)


def guarantee(record: CategoryCalibration, level: Level) -> str:
    """Return what a calibration promises of the rate of false alarms.

    Args:
        record: Calibration of a category.
        level: One of its levels; see `CategoryCalibration.level`.

    Example:
        >>> from anomaly_clip.decisions.calibration import CategoryCalibration
        >>> from anomaly_clip.decisions.sentences import guarantee
        >>> record = CategoryCalibration(tuple(range(12)))
        >>> guarantee(record, record.level(0.05)).partition(", ")[2]
        '5 % false alarms cannot be had: 7.7 % is the smallest rate on average; ...'
    """
    if record.kind == "cross_validation":
        return _estimate(record.num_images, level)
    images = _images(record.num_images, "calibration image")
    alpha, average = _typed(level.alpha), percent(level.average)
    confidence = _typed(CONFIDENCE if level.confidence is None else level.confidence)
    guaranteed = percent(level.guaranteed)
    if not level.is_as_asked:
        needed = f"{alpha} needs {normals_needed(level.alpha, level.confidence):,}."
        if level.confidence is None:
            return (
                f"With {images}, {alpha} false alarms cannot be had: "
                f"{_above(level.average, level.alpha)} is the smallest rate on average; "
                f"{guaranteed} is guaranteed with {confidence} confidence. {needed}"
            )
        return (
            f"With {images}, {alpha} false alarms cannot be guaranteed with {confidence} "
            f"confidence: {_above(level.guaranteed, level.alpha)} is the smallest rate; "
            f"{average} is expected on average. {needed}"
        )
    if level.confidence is None:
        text = (
            f"With {images}, at most {alpha} false alarms are expected on average; {guaranteed} is "
            f"guaranteed with {confidence} confidence."
        )
    else:
        text = (
            f"With {images}, at most {alpha} false alarms are guaranteed with {confidence} "
            f"confidence; {average} is expected on average."
        )
    for rate in LOWER_RATES:
        needed_images = normals_needed(rate, level.confidence or CONFIDENCE)
        if rate < level.alpha and needed_images > record.num_images:
            return f"{text} A {_typed(rate)} guarantee needs {needed_images:,}."
    return text


def _estimate(num_images: int, level: Level) -> str:
    """Return the message of a model that was fitted on its calibration images."""
    images = _images(num_images, "image")
    if level.average > level.alpha:
        return (
            f"Estimated by cross-validation on {images}: {_above(level.average, level.alpha)} "
            f"false alarms, the smallest rate; {_typed(level.alpha)} needs "
            f"{normals_needed(level.alpha):,}. This is no guarantee."
        )
    rate = _typed(level.alpha) if level.confidence is None else percent(level.average)
    return f"Estimated by cross-validation on {images}: {rate} false alarms. This is no guarantee."


def _images(count: int, noun: str) -> str:
    return f"this one {noun}" if count == 1 else f"these {count:,} {noun}s"


def _typed(rate: float) -> str:
    """Return a rate that was typed, with all of its digits."""
    return f"{_plain(100 * rate, MAX_DIGITS)} %"


def _above(rate: float, alpha: float) -> str:
    """Return a rate with enough digits to differ from a lower one."""
    texts = (_percent(rate, more) for more in range(MAX_DIGITS))
    return next((text for text in texts if float(text[:-2]) > 100 * alpha), _percent(rate, 0))


def _percent(rate: float, more: int) -> str:
    value = 100 * rate
    digits = 1 if value >= 1 or value == 0 else 1 - math.floor(math.log10(value))
    return f"{_plain(round(value, digits + more), MAX_DIGITS)} %"


def _plain(value: float, digits: int) -> str:
    """Return a number without an exponent and without needless zeros."""
    text = f"{Decimal(f'{value:.{digits}g}'):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
