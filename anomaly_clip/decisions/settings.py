"""Options of calibration and decisions, shared by fit, calibrate, test and predict."""

from __future__ import annotations

from dataclasses import dataclass

from anomaly_clip.errors import check_at_least, check_between

__all__ = ["DEFAULT_ALPHA", "CalibrationSettings"]

DEFAULT_ALPHA = 0.05
"""False-alarm rate of a calibration."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Options of decisions; see docs/decisions.md.

    Args:
        alpha: False-alarm rate: the largest share of normal images that are called anomalous. With
            several, the first decides. Default: 0.05, and for test and predict that of the
            calibration.
        confidence: null: the rate holds on average over calibration sets. 0.95: it holds for 95 %
            of calibration sets, which needs more images.
        file: calibration.json, or folder of a calibrated run, for test and predict; default: the
            calibration in the checkpoint.
        folds: fit only: calibrate by cross-validation in so many folds instead of images that are
            held out. The model is then fitted on all images, and its rate is an estimate.
        map_percentile: Percentile of the map values of the calibration images, above which pixels
            are marked; default: a threshold that at most alpha of the normal images exceed
            anywhere.
        seed: Seed of the random choice of calibration images and of ties.
    """

    alpha: float | list[float] | None = None
    confidence: float | None = None
    file: str | None = None
    folds: int | None = None
    map_percentile: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for alpha in self.alphas:
            check_between("calibration.alpha", alpha, 0, 1, open_low=True, open_high=True)
        if not self.alphas or len(set(self.alphas)) != len(self.alphas):
            raise ValueError(f"calibration.alpha is {self.alpha}: give one or more distinct rates")
        if self.confidence is not None:
            check_between(
                "calibration.confidence", self.confidence, 0, 1, open_low=True, open_high=True
            )
        if self.folds is not None:
            check_at_least("calibration.folds", self.folds, 2)
        if self.map_percentile is not None:
            check_between("calibration.map_percentile", self.map_percentile, 0, 100, open_high=True)
        check_at_least("calibration.seed", self.seed, 0)

    @property
    def alphas(self) -> list[float]:
        """The false-alarm rates; the first one decides."""
        if self.alpha is None:
            return [DEFAULT_ALPHA]
        return list(self.alpha) if isinstance(self.alpha, list) else [self.alpha]
