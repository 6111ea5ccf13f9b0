"""``calibration.json``: the scores of normal images of each category, and thresholds from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomaly_clip.decisions.conformal import (
    CONFIDENCE,
    average_rate,
    guaranteed_rate,
    p_values,
    plain_rate,
    rank_of,
    threshold_of,
)
from anomaly_clip.decisions.order_statistics import order_statistics
from anomaly_clip.documents import load_json
from anomaly_clip.errors import UserError, check_between, check_choice, shortened
from anomaly_clip.files import write_json

__all__ = [
    "ANOMALOUS",
    "CALIBRATION_FILE",
    "KINDS",
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
KINDS = ("split", "cross_validation")
MAX_REASON = 200
"""Characters of what is wrong in a damaged file."""
TOLERANCE = 1e-6
"""Largest relative difference of rates that versions of SciPy may compute differently."""


@dataclass(frozen=True)
class Level:
    """Decision at one false-alarm rate.

    Args:
        alpha: The rate that was asked for.
        confidence: None if it was asked for on average over calibration sets.
        k: Rank of the threshold among the calibration scores, 1 = the largest.
        threshold: An image is anomalous if its score is above this.
        average: False-alarm rate on average over calibration sets. It is above ``alpha`` if there
            are too few images for that, and then the smallest that can be had.
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
        return (self.average if self.confidence is None else self.guaranteed) <= self.alpha


@dataclass(frozen=True)
class CategoryCalibration:
    """Scores of the calibration images of a category.

    Args:
        scores: Their image scores, ascending and finite.
        map_threshold: Pixels above this are marked in drawings and masks; None without maps.
        part_ranges: Lowest and highest value of each part of a score, from other images.
        images: Hashes of the decoded calibration images, and of those that gave the ranges.
        words: Name of the category in prompts.
        kind: split: the images were not fitted on. cross_validation: each was scored by a model
            that was fitted without it, and the model at hand was fitted on all.
        counts: Number of images that each score stands for; None: one.

    Raises:
        ValueError: If there are no scores, or values are not as described.
    """

    scores: tuple[float, ...]
    map_threshold: float | None = None
    part_ranges: tuple[tuple[float, float], ...] | None = None
    images: tuple[str, ...] = ()
    words: str | None = None
    kind: Literal["split", "cross_validation"] = "split"
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(map(float, self.scores)))
        scores = np.asarray(self.scores, dtype=np.float64)
        if not len(scores) or not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
            raise ValueError(f"{len(scores)} calibration scores: expected finite, ascending ones")
        if self.counts is not None and (
            len(self.counts) != len(scores) or min(self.counts, default=0) < 1
        ):
            raise ValueError(f"{len(self.counts)} counts: expected {len(scores)} of 1 or more")
        if self.map_threshold is not None and not math.isfinite(self.map_threshold):
            raise ValueError(f"the map threshold must be finite, got {self.map_threshold}")
        for low, high in self.part_ranges or ():
            if not -math.inf < low <= high < math.inf:
                raise ValueError(f"a range of score parts is {low} to {high}")
        check_choice("kind", self.kind, KINDS)

    @cached_property
    def num_images(self) -> int:
        """Number ``n`` of calibration scores."""
        return len(self.scores) if self.counts is None else sum(self.counts)

    @cached_property
    def all_scores(self) -> NDArray[np.float64]:
        """All calibration scores ``(n,)``, ascending."""
        return np.repeat(self._values, 1 if self.counts is None else self.counts)

    @cached_property
    def _values(self) -> NDArray[np.float64]:
        return np.asarray(self.scores, dtype=np.float64)

    def level(self, alpha: float, confidence: float | None = None) -> Level:
        """Return the decision at a rate, or at the smallest that can be had.

        Args:
            alpha: Largest false-alarm rate, in (0, 1).
            confidence: None: on average over calibration sets. Otherwise see `rank_of`.
        """
        n = self.num_images
        k = max(1, rank_of(alpha, n, confidence))
        return Level(
            plain_rate(alpha),
            None if confidence is None else float(confidence),
            k,
            threshold_of(self._values, k, self.counts),
            average_rate(k, n),
            guaranteed_rate(k, n, CONFIDENCE if confidence is None else confidence),
        )

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return the p-values of image scores ``(m,)``."""
        return p_values(scores, self._values, self.counts)

    def stored(self, levels: Iterable[Level]) -> CategoryCalibration:
        """Return a record of at most 10,000 scores with the same thresholds at these levels.

        Its p-values are not smaller than those of all scores.
        """
        if self.counts is not None:
            return self
        scores, counts = order_statistics(self.scores, {level.k for level in levels})
        return replace(self, scores=scores, counts=counts)


def scaled_score(parts: ArrayLike, ranges: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Return the sum of the parts of scores, each scaled by its range and not clamped.

    Args:
        parts: ``(m, P)``, or ``(P,)`` of a single image.
        ranges: Lowest and highest value of each part; a part of constant value counts as zero.

    Returns:
        ``(m,)``.

    Raises:
        ValueError: If there are not as many ranges as parts.

    Example:
        >>> from anomaly_clip.decisions.calibration import scaled_score
        >>> scaled_score([[1.0, 30.0]], [(0.0, 2.0), (10.0, 20.0)]).tolist()
        [2.5]
    """
    values = np.atleast_2d(np.asarray(parts, dtype=np.float64))  # (m, P)
    if values.shape[1] != len(ranges):
        raise ValueError(f"{values.shape[1]} score parts, but {len(ranges)} ranges")
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
        conditions: Everything that scores depend on besides the images: weights, settings of the
            method, preprocessing. Scores under other conditions are not comparable.
        alphas: False-alarm rates that were asked for; the first one decides.
        confidence: See `Level`.
        versions: Versions of the packages.

    Raises:
        ValueError: If there is no category, or a rate is not in (0, 1).
    """

    method: str
    categories: Mapping[str, CategoryCalibration]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = (0.05,)
    confidence: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(map(plain_rate, self.alphas)))
        if not self.alphas or not self.categories:
            raise ValueError(f"{len(self.categories)} categories and {len(self.alphas)} rates")
        if self.confidence is not None:
            check_between("confidence", self.confidence, 0, 1, open_low=True, open_high=True)

    def of(self, category: str, is_named: bool = True) -> CategoryCalibration:
        """Return the calibration of a category.

        Args:
            category: Its name.
            is_named: False if the name is only that of a folder: a calibration of a single category
                then applies.

        Raises:
            UserError: If it was not calibrated.
        """
        if category in self.categories:
            return self.categories[category]
        if not is_named and len(self.categories) == 1:
            return next(iter(self.categories.values()))
        raise UserError(
            f"the calibration has no category {category!r}, only {', '.join(self.categories)}: "
            f"calibrate it, or name one of these"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``calibration.json``, of plain values.

        At most 10,000 scores per category are kept: see `CategoryCalibration.stored`.
        """
        return {
            "format": FORMAT,
            "method": self.method,
            "alpha": list(self.alphas),
            "confidence": self.confidence,
            "categories": {
                name: self._category_content(record) for name, record in self.categories.items()
            },
            "conditions": dict(self.conditions),
            "versions": dict(self.versions),
        }

    def _category_content(self, record: CategoryCalibration) -> dict[str, Any]:
        levels = [record.level(alpha, self.confidence) for alpha in self.alphas]
        stored = record.stored([*levels, *map(record.level, self.alphas)])
        return {
            "n": stored.num_images,
            "levels": [{**asdict(level), "as_asked": level.is_as_asked} for level in levels],
            "scores": list(stored.scores),
            "counts": None if stored.counts is None else list(stored.counts),
            "map_threshold": stored.map_threshold,
            "part_ranges": None
            if stored.part_ranges is None
            else [list(limits) for limits in stored.part_ranges],
            "images": list(stored.images),
            "words": stored.words,
            "kind": stored.kind,
        }

    @classmethod
    def from_dict(cls, content: object, source: str) -> Calibration:
        """Read the content of ``calibration.json``.

        Args:
            content: See `as_dict`.
            source: Where it is from, for messages.

        Raises:
            UserError: If it is damaged, or of a newer version of this package.
        """
        try:
            document = _mapping("the content", content)
            version = _number("format", document.get("format"), int)
            if version > FORMAT:
                raise UserError(
                    f"{source}: its format is {version}, but this version of anomaly_clip reads up "
                    f"to {FORMAT}: install a newer version, or calibrate again"
                )
            if version != FORMAT:
                raise ValueError(f"format is {version}")
            categories = _mapping("categories", document["categories"])
            confidence = document["confidence"]
            calibration = cls(
                _text("method", document["method"]),
                {_text("a name", key): _category(value) for key, value in categories.items()},
                _mapping("conditions", document["conditions"]),
                _numbers("alpha", document["alpha"]),
                None if confidence is None else _number("confidence", confidence),
                _mapping("versions", document["versions"]),
            )
            for name, record in calibration.categories.items():
                _check_derived(name, categories[name], calibration._category_content(record))
        except (LookupError, ValueError, ArithmeticError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{source}: no calibration, or a damaged one ({shortened(missing, MAX_REASON)}): "
                f"calibrate again"
            ) from None
        return calibration

    def write(self, path: Path) -> None:
        """Write ``calibration.json`` atomically."""
        write_json(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read ``calibration.json``, or the one in a folder; see `from_dict`.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        file = path / CALIBRATION_FILE if path.is_dir() else path
        try:
            content = load_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{file}: no calibration can be read ({error.strerror or error}): name the "
                f"{CALIBRATION_FILE} of a calibrated run, or calibrate"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{file}: no calibration, or a damaged one ({error}): calibrate again"
            ) from None
        return cls.from_dict(content, str(file))


def _category(content: object) -> CategoryCalibration:
    record = _mapping("a category", content)
    ranges, words, counts = record["part_ranges"], record["words"], record["counts"]
    threshold = record["map_threshold"]
    return CategoryCalibration(
        _numbers("scores", record["scores"]),
        None if threshold is None else _number("map_threshold", threshold),
        None
        if ranges is None
        else tuple(_pair("part_ranges", limits) for limits in _list("part_ranges", ranges)),
        tuple(_text("images", image) for image in _list("images", record["images"])),
        None if words is None else _text("words", words),
        record["kind"],
        None
        if counts is None
        else tuple(_number("counts", count, int) for count in _list("counts", counts)),
    )


def _check_derived(name: str, stored: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Check that values which follow from the scores were not changed by hand.

    Raises:
        ValueError: If one was.
    """
    if stored["n"] != computed["n"]:
        raise ValueError(f"{name}: n is {stored['n']}, but there are {computed['n']} scores")
    levels = _list("levels", stored["levels"])
    if len(levels) != len(computed["levels"]):
        raise ValueError(f"{name}: there are {len(levels)} levels")
    for number, (level, expected) in enumerate(zip(levels, computed["levels"], strict=True)):
        for key, value in expected.items():
            given = _mapping("levels", level)[key]
            if key in ("average", "guaranteed"):
                is_same = math.isclose(_number(key, given), value, rel_tol=TOLERANCE)
            else:
                is_same = isinstance(given, bool) == isinstance(value, bool) and given == value
            if not is_same:
                raise ValueError(
                    f"{name}: {key} of level {number + 1} is {given}, but by the scores it is "
                    f"{value}"
                )


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected names and values, got {str(value)[:40]}")
    return value


def _list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: expected a list, got {str(value)[:40]}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {str(value)[:40]}")
    return value


def _number(name: str, value: object, kind: type = float) -> Any:
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {str(value)[:40]}")
    return kind(value)


def _numbers(name: str, value: object) -> tuple[float, ...]:
    return tuple(_number(name, number) for number in _list(name, value))


def _pair(name: str, value: object) -> tuple[float, float]:
    low, high = _numbers(name, value)
    return low, high
