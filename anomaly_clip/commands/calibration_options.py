"""The options ``--calibrate`` and ``--calibration.*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError

__all__ = ["add_calibration_options", "check_calibration_options"]


def add_calibration_options(parser: LightningArgumentParser) -> None:
    """Add the options to the parser of an experiment's verb."""
    parser.add_argument(
        "--calibrate",
        type=bool,
        default=False,
        help="fit only: hold normal images out of the fit, and calibrate on them",
    )
    parser.add_class_arguments(CalibrationSettings, "calibration")


def check_calibration_options(verb: str, typed: Sequence[str], config: Mapping[str, Any]) -> None:
    """Check that no option of calibration is without effect.

    Args:
        verb: The verb.
        typed: Arguments of the command line. The configuration of a fit may have its options.
        config: The complete configuration.

    Raises:
        UserError: If one is.
    """
    names = {word.partition("=")[0] for word in typed}
    if verb != "fit" and "--calibrate" in names and config["calibrate"]:
        raise UserError(
            f"--calibrate is an option of fit, not of {verb}: leave it out, and use anomaly_clip "
            f"calibrate"
        )
    if verb != "fit" and "--calibration.folds" in names:
        raise UserError(
            f"--calibration.folds is an option of fit --calibrate true, not of {verb}: leave it out"
        )
    if verb == "fit" and not config["calibrate"]:
        unused = sorted(name for name in names if name.startswith("--calibration."))
        if unused or config["calibration"]["folds"] is not None:
            option = unused[0] if unused else "calibration.folds"
            raise UserError(
                f"{option} has no effect on a fit that is not calibrated: add --calibrate true, or "
                f"leave it out"
            )
