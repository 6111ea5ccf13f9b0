"""Calibration by cross-validation, for few normal images: each is scored by a fit without it.

The deployed model is fitted on all images. It is none of the models that gave the calibration
scores, so no rate of false alarms is guaranteed; it is only estimated.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from anomaly_clip.data.calibration_images import HoldOut
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import say
from anomaly_clip.recording.calibrating import (
    Calibrated,
    ScoredImage,
    ScoredImages,
    build_category,
    calibration_images,
    finish,
)
from anomaly_clip.recording.scoring_conditions import conditions_of

__all__ = ["check_folds", "cross_validate"]


def check_folds(method: AnomalyMethod, settings: CalibrationSettings) -> None:
    """Check that a method and its options can be calibrated by cross-validation.

    Raises:
        UserError: If they cannot.
    """
    if not method.loader_needs.single_pass:
        raise UserError(
            f"calibration.folds {settings.folds}: cross-validation is for methods that are fitted "
            f"in a single pass, such as PaDiM and PatchCore, and not for {type(method).__name__}: "
            f"leave calibration.folds out, and images are held out instead"
        )
    if settings.map_percentile is not None:
        raise UserError(
            f"calibration.map_percentile {settings.map_percentile:g} needs the maps of a single "
            f"model: leave it or calibration.folds out"
        )


def cross_validate(
    trainer: Trainer,
    fitted: LightningModule,
    unfitted: AnomalyMethod,
    data: AnomalyData,
    settings: CalibrationSettings,
) -> Calibrated:
    """Score each normal image with a model that was fitted on the other folds.

    Args:
        trainer: Trainer of the fit of ``fitted``.
        fitted: The model that is used, fitted on all images; ``calibration`` is set.
        unfitted: A copy of it before its fit.
        data: Its data module.
        settings: Rates, number of folds and seed.

    Raises:
        ValueError: If there are fewer images than folds, or the fit runs in several processes.
    """
    assert isinstance(fitted, AnomalyMethod)
    assert settings.folds is not None
    if trainer.world_size > 1:
        raise ValueError(
            f"calibration.folds {settings.folds} runs in one process, and this fit in "
            f"{trainer.world_size}: set trainer.devices 1, or leave calibration.folds out"
        )
    conditions = conditions_of(trainer, fitted, data)
    every = ScoredImages(conditions=conditions, scaled_parts=fitted.scaled_parts)
    images: dict[str, list[ScoredImage]] = {}
    for fold in range(settings.folds):
        say(f"fold {fold + 1} of {settings.folds}")
        data.calibration.request(HoldOut(0, settings.seed, (fold, settings.folds)))
        model = copy.deepcopy(unfitted)
        alone = _trainer_like(trainer)
        alone.fit(model, datamodule=data)
        scored = ScoredImages(quiet=True)
        with calibration_images(alone, data, scored):
            alone.predict(model, datamodule=data, return_predictions=False)
        for category, rows in scored.images.items():
            images.setdefault(category, []).extend(rows.values())
    data.calibration.request(None)
    categories = {
        name: build_category(name, scores, data, settings, every, "cross_validation")
        for name, scores in images.items()
    }
    return finish(fitted, data, settings, categories, every)


def _trainer_like(trainer: Trainer) -> Trainer:
    """Return a trainer of a fold: same device and precision, without files and output."""
    options: dict[str, Any] = {
        "accelerator": trainer.strategy.root_device.type.replace("cuda", "gpu"),
        "devices": 1,
        "precision": trainer.precision,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**options)
