"""``fit --calibrate true``: images held out of a fit, on which it is calibrated at its end."""

from __future__ import annotations

import copy
import math
import shlex
from typing import Protocol

from lightning.pytorch import LightningModule, Trainer

from anomaly_clip.commands.last_step import last_checkpoint
from anomaly_clip.data.calibration_images import HoldOut
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.decisions.conformal import normals_needed
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import say
from anomaly_clip.recording.calibrating import calibrate, report
from anomaly_clip.recording.calibration_files import (
    calibration_file,
    images_of,
    write_into_checkpoint,
)
from anomaly_clip.recording.cross_validation import check_folds, cross_validate
from anomaly_clip.recording.writer import RunWriter

__all__ = [
    "calibrate_fit",
    "check_calibratable",
    "check_kept",
    "hold_images_out",
    "prepare_data",
]

SHARE_OF_RANGES = 1 / 3
"""Fraction of the images that give the ranges of score parts, for methods with parts."""


def check_calibratable(model: LightningModule) -> None:
    """Check that a model is a detector whose scores do not depend on the other images.

    Raises:
        UserError: If it is not.
    """
    name = type(model).__name__
    if not isinstance(model, AnomalyMethod):
        raise UserError(f"{name} gives no anomaly scores to calibrate: choose a detector")
    if model.transductive:
        raise UserError(
            f"{name} scores images by each other, so that no threshold holds for the next ones: "
            f"choose another method to decide with"
        )


def hold_images_out(
    model: LightningModule, data: AnomalyData, settings: CalibrationSettings
) -> AnomalyMethod | None:
    """Let a data module hold as many normal images out of the fit as the false-alarm rate needs.

    Returns:
        A copy of the model before its fit, if it is calibrated by cross-validation instead.

    Raises:
        UserError: If the model cannot be calibrated.
    """
    check_calibratable(model)
    assert isinstance(model, AnomalyMethod)
    if settings.folds is not None:
        check_folds(model, settings)
        data.calibration.request(HoldOut(0, settings.seed, (None, settings.folds)))
        return copy.deepcopy(model)
    needed = normals_needed(settings.alphas[0], settings.confidence)
    if model.score_part_names:
        needed = math.ceil(needed / (1 - SHARE_OF_RANGES))
    data.calibration.request(HoldOut(needed, settings.seed))
    return None


class Built(Protocol):
    """Model and data module of a command line."""

    model: LightningModule
    datamodule: AnomalyData


def prepare_data(
    verb: str, calibrates: bool, built: Built, settings: CalibrationSettings
) -> AnomalyMethod | None:
    """Prepare the data module of a verb for its calibration.

    A test needs the images of a ``calibration.json``, which it must not contain.

    Returns:
        See :func:`hold_images_out`; None for other verbs than a calibrated fit.

    Raises:
        UserError: If the model cannot be calibrated, or the file cannot be read.
    """
    data = built.datamodule
    if verb == "test" and settings.file is not None:
        data.calibration.images_of_file = images_of(calibration_file(settings.file))
    if verb == "fit" and calibrates:
        return hold_images_out(built.model, data, settings)
    return None


def check_kept(trainer: Trainer) -> None:
    """Check that a fit keeps a checkpoint, into which its calibration is written.

    Raises:
        UserError: If it does not.
    """
    if last_checkpoint(trainer) is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            "--calibrate true writes the calibration into the checkpoint of the fit, and "
            "trainer.enable_checkpointing false keeps none: leave one of them out"
        )


def calibrate_fit(
    trainer: Trainer,
    model: LightningModule,
    data: AnomalyData,
    writer: RunWriter,
    unfitted: AnomalyMethod | None,
) -> None:
    """Calibrate the model of a fit on the images held out, and write its calibration.

    Args:
        trainer: Trainer of the fit.
        model: The fitted model.
        data: Data module of the fit.
        writer: Writer of the run.
        unfitted: Copy of the model before its fit, for cross-validation; None: without.

    Raises:
        ValueError: If there are too few images; the checkpoint of the fit is complete.
    """
    assert isinstance(model, AnomalyMethod)
    file = last_checkpoint(trainer)
    if file is None:
        say("trainer.fast_dev_run keeps no checkpoint, so this fit is not calibrated")
        return
    try:
        if unfitted is None:
            calibrated = calibrate(trainer, model, data, writer.calibration)
        else:
            calibrated = cross_validate(trainer, model, unfitted, data, writer.calibration)
    except ValueError as error:
        raise ValueError(
            f"{error} (the fit is complete: calibrate it with anomaly_clip calibrate --ckpt_path "
            f"{shlex.quote(str(file))})"
        ) from None
    if trainer.is_global_zero:
        writer.unreadable.images += calibrated.unreadable
        written = write_into_checkpoint(calibrated.calibration, file)
        report(calibrated)
        say(f"calibration: {written}")
