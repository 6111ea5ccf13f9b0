"""``calibration.json``: the scores of normal images of each category, and thresholds from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomaly_clip.decisions.conformal import (
    CONFIDENCE,
    average_rate,
    guaranteed_rate,
    p_values,
    rank_of,
    threshold_of,
)
from anomaly_clip.documents import load_json
from anomaly_clip.errors import UserError
from anomaly_clip.files import write_json

__all__ = [
    "ANOMALOUS",
    "CALIBRATION_FILE",
    "NORMAL",
    "Calibration",
    "CategoryCalibration",
    "Level",
    "scaled_score",
]

CALIBRATION_FILE = "calibration.json"
FORMAT = 1
NORMAL, ANOMALOUS = "normal", "anomalous"
"""Decisions."""


@dataclass(frozen=True)
class Level:
    """Decision at one false-alarm rate.

    Args:
        alpha: The rate that was asked for.
        confidence: None if it was asked for on average over calibration sets.
        k: Rank of the threshold among the calibration scores, 1 = the largest.
        threshold: An image is anomalous if its score is above this.
        average: False-alarm rate on average over calibration sets. It is above ``alpha`` if there are too
            few images for that, and then the smallest that can be had.
        guaranteed: The rate that holds for 95 % of calibration sets, or for ``confidence``.
    """

    alpha: float
    confidence: float | None
    k: int
    threshold: float
    average: float
    guaranteed: float

    @property
    def is_as_asked(self) -> bool:
        """False if there are too few calibration images for ``alpha``."""
        rate = self.average if self.confidence is None else self.guaranteed
        return rate <= self.alpha * (1 + 1e-9)


@dataclass(frozen=True)
class CategoryCalibration:
    """Scores of the calibration images of a category.

    Args:
        scores: Their image scores, ascending.
        map_threshold: Pixels above this are marked in drawings and masks; None without maps.
        part_ranges: Lowest and highest value of each part of a score, from other images.
        images: Hashes of the decoded calibration images, and of those that gave the ranges.
        words: Name of the category in prompts.
        kind: split: the images were not fitted on. cross_validation: each was scored by a model that was
            fitted without it, and the model at hand was fitted on all.
    """

    scores: tuple[float, ...]
    map_threshold: float | None = None
    part_ranges: tuple[tuple[float, float], ...] | None = None
    images: tuple[str, ...] = ()
    words: str | None = None
    kind: Literal["split", "cross_validation"] = "split"

    @property
    def num_images(self) -> int:
        """Number ``n`` of calibration scores."""
        return len(self.scores)

    def level(self, alpha: float, confidence: float | None = None) -> Level:
        """Return the decision at a rate, or at the smallest that can be had."""
        n = self.num_images
        k = max(1, rank_of(alpha, n, confidence))
        return Level(
            alpha,
            confidence,
            k,
            threshold_of(self.scores, k),
            average_rate(k, n),
            guaranteed_rate(k, n, confidence or CONFIDENCE),
        )

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return the p-values of image scores ``(m,)``."""
        return p_values(scores, self.scores)


def scaled_score(parts: ArrayLike, ranges: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Return the sum of the parts of scores, each scaled by its range and not clamped.

    Args:
        parts: ``(m, P)``.
        ranges: Lowest and highest value of each part; a part of constant value counts as zero.

    Returns:
        ``(m,)``.
    """
    values = np.asarray(parts, dtype=np.float64).reshape(-1, len(ranges))
    total = np.zeros(len(values))
    for column, (low, high) in enumerate(ranges):
        if high > low:
            total += (values[:, column] - low) / (high - low)
    return total


@dataclass(frozen=True)
class Calibration:
    """Calibration of a method, per category.

    Args:
        method: Name of the method's class.
        categories: By name.
        conditions: Everything that scores depend on besides the images: weights, settings of the method,
            preprocessing. Scores under other conditions are not comparable.
        alphas: False-alarm rates that were asked for; the first one decides.
        confidence: See `Level`.
        versions: Versions of the packages.
    """

    method: str
    categories: Mapping[str, CategoryCalibration]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = (0.05,)
    confidence: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def of(self, category: str, is_named: bool = True) -> CategoryCalibration:
        """Return the calibration of a category.

        Args:
            category: Its name.
            is_named: False if the name is only that of a folder: a calibration of a single category then
                applies.

        Raises:
            UserError: If it was not calibrated.
        """
        if category in self.categories:
            return self.categories[category]
        if not is_named and len(self.categories) == 1:
            return next(iter(self.categories.values()))
        raise UserError(
            f"the calibration has no category {category!r}, only {', '.join(self.categories)}: calibrate "
            f"it, or name one of these"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``calibration.json``, of plain values."""
        return {
            "format": FORMAT,
            "method": self.method,
            "alpha": list(self.alphas),
            "confidence": self.confidence,
            "categories": {
                name: {
                    "n": record.num_images,
                    "levels": [
                        asdict(record.level(alpha, self.confidence)) for alpha in self.alphas
                    ],
                    **asdict(record),
                }
                for name, record in self.categories.items()
            },
            "conditions": dict(self.conditions),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str) -> Calibration:
        """Read the content of ``calibration.json``.

        Args:
            content: See `as_dict`.
            source: Where it is from, for messages.

        Raises:
            UserError: If it is damaged, or of a newer version of this package.
        """
        version = content.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{source}: its format is {version}, but this version of anomaly_clip reads up to "
                f"{FORMAT}: install a newer version, or calibrate again"
            )
        try:
            categories = {
                str(name): _category(record) for name, record in content["categories"].items()
            }
            if version != FORMAT or not categories:
                raise ValueError(f"format {version}, {len(categories)} categories")
            return cls(
                str(content["method"]),
                categories,
                dict(content["conditions"]),
                tuple(float(alpha) for alpha in content["alpha"]),
                content["confidence"],
                dict(content["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{source}: no calibration, or a damaged one ({type(error).__name__}: {error}): "
                f"calibrate again"
            ) from None

    def write(self, path: Path) -> None:
        """Write ``calibration.json`` atomically."""
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read ``calibration.json``; see `from_dict`.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        try:
            content = load_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no calibration can be read ({error})") from None
        if not isinstance(content, Mapping):
            raise UserError(
                f"{path}: no calibration: name the calibration.json of a calibrated run"
            )
        return cls.from_dict(content, str(path))


def _category(record: Mapping[str, Any]) -> CategoryCalibration:
    ranges = record["part_ranges"]
    scores = tuple(float(score) for score in record["scores"])
    if not scores or list(scores) != sorted(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, which must be finite and ascending")
    return CategoryCalibration(
        scores,
        None if record["map_threshold"] is None else float(record["map_threshold"]),
        None if ranges is None else tuple((float(low), float(high)) for low, high in ranges),
        tuple(map(str, record["images"])),
        record["words"],
        record["kind"],
    )
