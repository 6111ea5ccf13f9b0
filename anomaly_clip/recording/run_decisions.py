"""The calibration of a run: found, checked, applied, and recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from anomaly_clip.decisions.calibration import Calibration
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError, check_between
from anomaly_clip.files import write_csv
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule, data_module
from anomaly_clip.progress import say
from anomaly_clip.recording.calibration_files import calibration_file
from anomaly_clip.recording.decision_record import decision_lines, decisions_record, num_anomalous
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.recording.drift_record import HEADER, drift_record
from anomaly_clip.recording.scoring_conditions import (
    check_calibration,
    check_conditions,
    conditions_of,
)
from anomaly_clip.results.folder import DRIFT_FILE, MASKS
from anomaly_clip.results.map_store import Ranges, Rows

__all__ = ["RunDecisions", "find_calibration"]

CHECKPOINT = "the checkpoint"
"""Source of a calibration in a checkpoint, for messages."""


class RunDecisions:
    """Options of the decisions of a run, and the decisions once there is a calibration.

    Every process has them. The first one reads the calibration, and all of them end if it cannot be
    used.

    Args:
        fdr: See :class:`~anomaly_clip.recording.decisions.Decisions`.
        masks: Whether masks are written, which needs a calibration with map thresholds.
        fail_on: Decision on which predict ends with an exit code of its own; None: on none.

    Raises:
        ValueError: If ``fdr`` is not between 0 and 1.
    """

    def __init__(
        self, fdr: float | None = None, masks: bool = False, fail_on: str | None = None
    ) -> None:
        if fdr is not None:
            check_between("output.fdr", fdr, 0, 1, open_low=True, open_high=True)
        self.fdr = fdr
        self.masks = masks
        self.fail_on = fail_on
        self.num_anomalous = 0
        """Number of images that were called anomalous, in the end."""
        self.made: Decisions | None = None
        """The decisions; None without a calibration."""

    @property
    def map_thresholds(self) -> dict[str, float]:
        """Map threshold by category; empty without a calibration."""
        return {} if self.made is None else self.made.map_thresholds

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold of image scores by category; empty without a calibration."""
        levels = {} if self.made is None else self.made.levels
        return {name: level.threshold for name, level in levels.items()}

    def marked(self, rows: Rows, highest: Mapping[int, float]) -> set[int]:
        """Return the indices of the images with pixels above the map threshold.

        Args:
            rows: Rows of all images.
            highest: Highest map value of each image that has a map.
        """
        thresholds = self.map_thresholds
        return {
            index
            for index, row in rows.items()
            if highest.get(index, -math.inf) > thresholds.get(row["category"], math.inf)
        }

    def find(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: CalibrationSettings,
        folder: Path,
    ) -> None:
        """Find the calibration of a test or of predict.

        Args:
            trainer: Trainer of the run.
            module: The method, whose checkpoint is loaded.
            settings: Options of decisions.
            folder: The run's folder.

        Raises:
            UserError: If there is a calibration that does not apply to the run, if there is none
                although an option needs one, or if masks would be written among the images.
        """
        self.made, self.num_anomalous = None, 0
        failure: str | None = None
        if trainer.is_global_zero:
            try:
                self.made = self._find(trainer, module, settings)
                if self.masks:
                    _check_folder(folder, module)
            except UserError as error:
                failure = str(error)
        self.made, failure = trainer.strategy.broadcast((self.made, failure))
        if failure is not None:
            raise UserError(failure)

    def announce(self, stage: str) -> None:
        """Print which calibration decides, if there is one.

        Args:
            stage: The verb.
        """
        if self.made is not None:
            say(self.made.describe())
            first = self.made.calibration.alphas[0]
            if self.made.alpha != first and self.made.map_thresholds:
                say(f"contours and masks stay at the threshold of the calibration's {first:g}")
        if self.fail_on is not None and stage == "test":
            say(f"output.fail_on {self.fail_on} has no effect on test, only on predict")

    def _find(
        self, trainer: Trainer, module: LightningModule, settings: CalibrationSettings
    ) -> Decisions | None:
        decisions = _decisions(trainer, module, settings, self.fdr)
        if decisions is None:
            fails = self.fail_on is not None and trainer.predicting
            options = {
                f"output.fail_on {self.fail_on}": fails,
                "output.masks": self.masks,
                "output.fdr": self.fdr is not None,
            }
            for option, is_set in options.items():
                if is_set and isinstance(module, EvaluatedModule) and module.transductive:
                    raise UserError(
                        f"{option} needs a threshold, but {type(module).__name__} scores images by "
                        f"each other, so that none holds: leave it out, or choose another method"
                    )
                if is_set:
                    raise UserError(
                        f"{option} needs a calibration: calibrate the method first (anomaly_clip "
                        f"calibrate), or name one with --calibration.file"
                    )
        elif self.masks:
            for name in decisions.records:
                if name not in decisions.map_thresholds:
                    raise UserError(
                        f"output.masks needs a map threshold, but {decisions.source} has none for "
                        f"{name}: leave the option out, or calibrate a method that has maps"
                    )
        return decisions

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that the run scores images as the calibration did, once the method is prepared.

        Raises:
            UserError: If it does not.
        """
        failure: str | None = None
        if self.made is None or not isinstance(module, AnomalyMethod):
            return
        if self.made.source == CHECKPOINT and trainer.ckpt_path:  # known once it is loaded
            self.made.source = str(trainer.ckpt_path)
        data = module.data
        if trainer.is_global_zero and data is not None:
            current = conditions_of(trainer, module, data)
            try:
                check_conditions(self.made.calibration.conditions, current, self.made.source)
            except UserError as error:
                failure = str(error)
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise UserError(failure)

    def decide(self, rows: Rows, ranges: Ranges, replaces_score: bool) -> Ranges:
        """Decide on the images of all processes, if there is a calibration.

        Args:
            rows: Rows of all processes, which get the p-value and the decision.
            ranges: Lowest and highest map value by category.
            replaces_score: See :meth:`~anomaly_clip.recording.decisions.Decisions.decide`.

        Returns:
            The scale of heat maps by category.
        """
        if self.made is None:
            return ranges
        self.made.decide(rows, replaces_score)
        self.num_anomalous = num_anomalous(rows)
        return self.made.colour_ranges(ranges)

    def record(
        self,
        folder: Path,
        rows: Rows,
        highest: Mapping[int, float],
        kinds: Mapping[int, str] | None = None,
    ) -> dict[str, Any] | None:
        """Write ``drift.csv`` of a predict, and print the decisions of each category.

        Args:
            folder: The run's folder.
            rows: Rows of all images, with their decisions.
            highest: Highest map value of each image that has a map.
            kinds: Kind of defect of each image of a test; None in predict.

        Returns:
            The section ``decisions`` of the results; None without a calibration.
        """
        if self.made is None:
            return None
        drift = drift_record(self.made, rows) if kinds is None else None
        if drift is not None:
            write_csv(folder / DRIFT_FILE, HEADER, drift.table)
        categories = None if drift is None else drift.categories
        section = decisions_record(self.made, rows, highest, kinds, categories)
        for line in [*decision_lines(section), self.made.too_few_for_fdr(rows)]:
            if line is not None:
                say(line)
        return section


def _decisions(
    trainer: Trainer, method: LightningModule, settings: CalibrationSettings, fdr: float | None
) -> Decisions | None:
    name, data = type(method).__name__, data_module(method)
    if not isinstance(method, AnomalyMethod) or data is None:
        if settings.file is not None:
            raise UserError(
                f"calibration.file {settings.file}: {name} has no anomaly scores to decide by: "
                f"leave the option out"
            )
        return None
    calibrated = find_calibration(settings.file, method.calibration)
    if calibrated is None:
        return None
    calibration, source = calibrated
    check_calibration(method, calibration, source)
    is_named = not data.has_default_name
    return Decisions(calibration, source, settings, data.categories, is_named, fdr)


def _check_folder(folder: Path, module: LightningModule) -> None:
    """Check that masks would not be taken for those of the data set."""
    data = data_module(module)
    if data is not None and data.root.resolve() == folder.resolve():
        raise UserError(
            f"output.masks would write into {folder / MASKS}, among the images of data.root: give "
            f"another --output.folder"
        )


def find_calibration(
    file: str | None, content: Mapping[str, Any] | None
) -> tuple[Calibration, str] | None:
    """Return the calibration of a run and its source; None without one.

    Args:
        file: ``calibration.json``, or the folder of a calibrated run; None: none was given.
        content: Content of a ``calibration.json`` in the checkpoint, which is used without a file.

    Raises:
        UserError: If the calibration is missing, or cannot be read.
    """
    if file is not None:
        path = calibration_file(file)
        return Calibration.read(path), str(path)
    if content is None:
        return None
    return Calibration.from_dict(content, CHECKPOINT), CHECKPOINT
