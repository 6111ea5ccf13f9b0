"""The options ``--calibrate`` and ``--calibration.*``."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from anomaly_clip.decisions.settings import CalibrationSettings

__all__ = ["add_calibration_options"]


def add_calibration_options(parser: LightningArgumentParser) -> None:
    """Add the options to the parser of an experiment's verb."""
    parser.add_argument(
        "--calibrate",
        type=bool,
        default=False,
        help="fit only: hold normal images out of the fit, and calibrate on them",
    )
    parser.add_class_arguments(CalibrationSettings, "calibration")
