"""Section ``decisions`` of ``predict.json`` and ``metrics.json``, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anomaly_clip.results.run_reader import expect

__all__ = ["SECTION", "CategoryDecisions", "Decisions", "Share", "read_decisions"]

SECTION = "decisions"
"""Key of the section."""


@dataclass(frozen=True)
class Share:
    """A share of images with its confidence interval.

    Args:
        count: Number of these images.
        total: Number of all images that it is a share of.
        value: The share, a fraction; None without images.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    count: int
    total: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class CategoryDecisions:
    """The decisions about the images of a category.

    Args:
        num_images: Number of decided images.
        num_anomalous: Number of those that are anomalous.
        num_calibration: Number ``n`` of calibration images.
        threshold: An image is anomalous if its score is above this.
        map_threshold: Pixels above this are marked; None without maps.
        average: False-alarm rate on average over calibration sets, a fraction.
        guaranteed: False-alarm rate that holds with 95 % confidence, or as was asked for.
        is_as_asked: False if there are too few calibration images for the rate that was asked for.
        is_guaranteed: False if the scores are of a cross-validation.
        sentence: The guarantee in plain words.
        num_marked: Number of normal images with marked pixels.
        drift: Largest value of the martingale if it has passed the alarm; None without an alarm.
        recall: Share of the anomalous images that are detected; None without labels.
        false_alarms: Share of the normal images that are not; None without labels.
        kinds: Recall by kind of defect.
    """

    num_images: int
    num_anomalous: int
    num_calibration: int
    threshold: float
    map_threshold: float | None
    average: float
    guaranteed: float
    is_as_asked: bool
    is_guaranteed: bool
    sentence: str
    num_marked: int
    drift: float | None
    recall: Share | None
    false_alarms: Share | None
    kinds: Mapping[str, Share] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """The decisions of a run.

    Args:
        alpha: False-alarm rate that was asked for, a fraction.
        confidence: Confidence that was asked for; None if the rate holds on average.
        fdr: False discovery rate to which the decisions are corrected; None if they are not.
        source: Checkpoint or file of the calibration; empty if each category has its own.
        categories: By name.
    """

    alpha: float
    confidence: float | None
    fdr: float | None
    source: str
    categories: Mapping[str, CategoryDecisions]

    @property
    def num_images(self) -> int:
        """Number of decided images of all categories."""
        return sum(category.num_images for category in self.categories.values())

    @property
    def num_anomalous(self) -> int:
        """Number of anomalous images of all categories."""
        return sum(category.num_anomalous for category in self.categories.values())


def read_decisions(content: Mapping[str, Any], file: Path) -> Decisions | None:
    """Read the section from the content of ``predict.json`` or ``metrics.json``.

    Args:
        content: Parsed JSON.
        file: The file, for messages.

    Returns:
        The decisions; None for a run without a calibration.

    Raises:
        UserError: If the section is damaged.
    """
    if SECTION not in content:
        return None
    section = content[SECTION]
    try:
        return Decisions(
            _number(section["alpha"]),
            _optional(section["confidence"]),
            _optional(section["fdr"]),
            source if isinstance(source := section["source"], str) else "",
            {str(name): _category(entry) for name, entry in section["categories"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        expect(False, file, f"has a damaged section {SECTION} ({type(error).__name__}: {error})")
        raise  # never reached


def _category(entry: Mapping[str, Any]) -> CategoryDecisions:
    drift = entry.get("drift") or {}
    return CategoryDecisions(
        int(entry["num_images"]),
        int(entry["num_anomalous"]),
        int(entry["n"]),
        _number(entry["threshold"]),
        _optional(entry.get("map_threshold")),
        _number(entry["average"]),
        _number(entry["guaranteed"]),
        bool(entry["as_asked"]),
        entry.get("kind") != "cross_validation",
        str(entry["sentence"]),
        int(entry.get("normal_with_marked_pixels") or 0),
        _number(drift["largest"]) if drift.get("alarm") else None,
        _share(entry.get("recall")),
        _share(entry.get("false_alarms")),
        {
            str(kind): share
            for kind, part in (entry.get("kinds") or {}).items()
            if (share := _share(part))
        },
    )


def _share(part: Mapping[str, Any] | None) -> Share | None:
    if part is None:
        return None
    value, low, high = (_optional(part[key]) for key in ("value", "low", "high"))
    return Share(int(part["count"]), int(part["total"]), value, low, high)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value}")
    return number
