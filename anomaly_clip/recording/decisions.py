"""Decisions on the images of a run, by the calibration of its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.decisions.calibration import (
    ANOMALOUS,
    NORMAL,
    Calibration,
    CategoryCalibration,
    Level,
    scaled_score,
)
from anomaly_clip.decisions.conformal import benjamini_hochberg
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.files import readable
from anomaly_clip.progress import number_of
from anomaly_clip.results.map_store import Ranges, Rows

__all__ = ["Decisions"]

DEFAULTS = CalibrationSettings()


class Decisions:
    """Decisions by the calibration of each category; equal in all processes of a run.

    Args:
        calibration: The calibration.
        source: Where it is from, for messages.
        settings: Options of decisions. The calibration's first rate is used if ``alpha`` is None,
            and its confidence if ``confidence`` is None.
        categories: Categories of the images.
        is_named: False if the name of the only category is that of its folder.
        fdr: False discovery rate of decisions over all images of the run (Benjamini-Hochberg);
            None: each image is decided upon alone.

    Raises:
        UserError: If a category has no calibration.
    """

    def __init__(
        self,
        calibration: Calibration,
        source: str,
        settings: CalibrationSettings = DEFAULTS,
        categories: Sequence[str] = (),
        is_named: bool = True,
        fdr: float | None = None,
    ) -> None:
        self.calibration = calibration
        self.source = source
        self.fdr = fdr
        self.seed = settings.seed
        self.alpha = (calibration.alphas if settings.alpha is None else settings.alphas)[0]
        self.confidence = settings.confidence or calibration.confidence
        self.records: dict[str, CategoryCalibration] = {
            name: self._record(name, is_named) for name in categories
        }
        self.levels: dict[str, Level] = {
            name: record.level(self.alpha, self.confidence) for name, record in self.records.items()
        }

    def _record(self, category: str, is_named: bool) -> CategoryCalibration:
        # A file has names as text, a checkpoint as they are on the disk.
        has_name = category in self.calibration.categories
        try:
            return self.calibration.of(category if has_name else readable(category), is_named)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None

    @property
    def map_thresholds(self) -> dict[str, float]:
        """Threshold of maps by category; categories without one are missing."""
        thresholds = {name: record.map_threshold for name, record in self.records.items()}
        return {name: value for name, value in thresholds.items() if value is not None}

    def describe(self) -> str:
        """Return the line on the screen that names the calibration and the rate."""
        if self.fdr is not None:
            rate = f"false discovery rate {100 * self.fdr:.6g} %"
        else:
            rate = f"requested false-alarm rate {100 * self.alpha:.6g} %"
            if self.confidence is not None:
                rate += f" with {100 * self.confidence:.6g} % confidence"
        return f"decisions by the calibration in {self.source}: {rate}"

    def decide(self, rows: Rows, replaces_score: bool) -> None:
        """Add p-value and decision to the rows of all images.

        Args:
            rows: Rows of all processes.
            replaces_score: For methods with score parts: whether the sum of the scaled parts
                replaces the image score. Otherwise it is added as ``decision_score``.
        """
        values: dict[int, float] = {}
        for name, record in self.records.items():
            indices = [index for index, row in rows.items() if row["category"] == name]
            if not indices:
                continue
            scores = _scores(record, [rows[index] for index in indices])
            level = self.levels[name]
            for index, score, value in zip(
                indices, scores.tolist(), record.p_values(scores).tolist(), strict=True
            ):
                row = rows[index]
                if record.part_ranges is not None:
                    row["image_score" if replaces_score else "decision_score"] = score
                row["p_value"] = values[index] = value
                row["decision"] = ANOMALOUS if score > level.threshold else NORMAL
        if self.fdr is not None and values:
            rejected = benjamini_hochberg(list(values.values()), self.fdr).tolist()
            for index, is_rejected in zip(values, rejected, strict=True):
                rows[index]["decision"] = ANOMALOUS if is_rejected else NORMAL

    def too_few_for_fdr(self, rows: Rows) -> str | None:
        """Return why no image is anomalous at the false discovery rate; None for another reason.

        Args:
            rows: Rows of all images, with their decisions.
        """
        if self.fdr is None or any(row["decision"] == ANOMALOUS for row in rows.values()):
            return None
        lowest = [
            row["p_value"]
            for row in rows.values()
            if row["p_value"] == 1 / (self.records[row["category"]].num_images + 1)
        ]
        if not lowest:
            return None
        return (
            f"no image is called anomalous at output.fdr {self.fdr}: the p-value of "
            f"{number_of(len(lowest), 'image')} is the smallest that there can be, "
            f"{min(lowest):.3g}, which is too large among {len(rows)}: calibrate on more images, "
            f"or leave output.fdr out"
        )

    def colour_ranges(self, ranges: Ranges) -> Ranges:
        """Return the scale of heat maps by category, which starts from the map threshold."""
        thresholds = self.map_thresholds
        return {
            name: [low, high]
            if (start := thresholds.get(name)) is None
            else [start, max(start, high)]
            for name, (low, high) in ranges.items()
        }


def _scores(record: CategoryCalibration, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the scores ``(m,)`` that are compared with those of the calibration images."""
    if record.part_ranges is None:
        return np.array([row["image_score"] for row in rows], dtype=np.float64)
    # The parts follow the image score, one column each.
    columns = [*rows[0]]
    start = columns.index("image_score") + 1
    names = columns[start : start + len(record.part_ranges)]
    return scaled_score([[row[name] for name in names] for row in rows], record.part_ranges)
