"""The files of a calibration: in a checkpoint, and ``calibration.json`` next to it."""

from __future__ import annotations

from pathlib import Path

import torch

from anomaly_clip.decisions.calibration import CALIBRATION_FILE, Calibration
from anomaly_clip.recording.checkpoint_io import AtomicCheckpointIO
from anomaly_clip.recording.run_conditions import file_sha256

__all__ = ["calibration_file", "is_version_of", "write_into_checkpoint"]

EARLIER = "sha256_before_calibration"
"""Entry of a checkpoint: hashes of its file before each calibration."""


def write_into_checkpoint(calibration: Calibration, checkpoint: Path) -> Path:
    """Write a calibration into a checkpoint, and next to it.

    Args:
        calibration: The calibration.
        checkpoint: The checkpoint, which is replaced atomically.

    Returns:
        The file next to it.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    content[EARLIER] = [*content.get(EARLIER, []), file_sha256(checkpoint)]
    content["calibration"] = calibration.as_dict()
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    file = checkpoint.parent / CALIBRATION_FILE
    calibration.write(file)
    return file


def is_version_of(checkpoint: Path, sha256: str) -> bool:
    """Return whether a checkpoint has a hash, or had it before it was calibrated."""
    if file_sha256(checkpoint) == sha256:
        return True
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds in damaged files, which are reported when they are used
        return False
    return isinstance(content, dict) and sha256 in content.get(EARLIER, [])


def calibration_file(value: str) -> Path:
    """Return the ``calibration.json`` that a value of ``--calibration.file`` refers to.

    Args:
        value: The file, or the folder of a calibrated run.
    """
    path = Path(value).expanduser()
    places = (path / CALIBRATION_FILE, path / "checkpoints" / CALIBRATION_FILE)
    return next((place for place in places if place.is_file()), path)
