"""``anomaly_clip calibrate``: thresholds with a bounded rate of false alarms, without a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomaly_clip.commands.experiment import (
    UNREADABLE,
    ExperimentCLI,
    arrange,
    known_options,
)
from anomaly_clip.commands.fit_calibration import check_calibratable
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.decisions.calibration import CALIBRATION_FILE
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.files import atomic_path
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import say, silence
from anomaly_clip.recording.calibrating import Calibrated, calibrate, report
from anomaly_clip.recording.calibration_files import write_into_checkpoint

__all__ = ["run_calibrate"]


def run_calibrate(words: Sequence[str]) -> int:
    """Calibrate a checkpoint, or a zero-shot method with a configuration.

    Returns:
        0, or 1 if some images could not be read.

    Raises:
        UserError: If the user made a mistake.
    """
    quieten()
    _check_words(words)
    try:
        with user_errors(known_options):
            cli = CalibrateCLI(args=arrange(["predict", *words[1:]]))
    finally:
        silence(False)
    return UNREADABLE if cli.trainer.is_global_zero and cli.calibrated.unreadable else 0


def _check_words(words: Sequence[str]) -> None:
    """Check that no option of another verb is given.

    Raises:
        UserError: If one is.
    """
    typed = {word.partition("=")[0] for word in words}
    if "--calibration.folds" in typed:
        raise UserError(
            "calibration.folds needs fits: use it with anomaly_clip fit --calibrate true, or leave "
            "it out"
        )
    if "--calibration.file" in typed:
        raise UserError(
            "calibration.file is read by test and predict; calibrate writes one, into the "
            "checkpoint's folder or --output.folder: leave it out"
        )


class CalibrateCLI(ExperimentCLI):
    """Command line of ``calibrate``: a ``predict`` on normal images that writes no scores."""

    run_verb = "calibrate"
    calibrated: Calibrated

    def before_predict(self) -> None:
        """Check the method.

        Raises:
            UserError: If it does not score single images.
        """
        check_calibratable(self.model)

    def predict(self, model: AnomalyMethod, **options: Any) -> None:
        """Calibrate; Lightning calls this in place of the trainer's method."""
        checkpoint, settings = options.get("ckpt_path"), self.writer.calibration
        self.calibrated = calibrate(self.trainer, model, self.datamodule, settings, checkpoint)

    def after_predict(self) -> None:
        """Write the calibration into the checkpoint and next to it, or into a run folder."""
        checkpoint = self.config[self._verb]["ckpt_path"]
        if not self.trainer.is_global_zero:
            return
        if checkpoint is not None:
            file = write_into_checkpoint(self.calibrated.calibration, Path(checkpoint))
        else:
            folder = self.writer.folder
            with atomic_path(folder / "config-calibrate.yaml") as temporary:
                temporary.write_text(self.writer.config, encoding="utf-8")
            file = folder / CALIBRATION_FILE
            self.calibrated.calibration.write(file)
        report(self.calibrated)
        say(f"calibration: {file}")
