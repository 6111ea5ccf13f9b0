"""The files of a calibration: in a checkpoint, and ``calibration.json`` next to it."""

from __future__ import annotations

from pathlib import Path

import torch

from anomaly_clip.decisions.calibration import CALIBRATION_FILE, Calibration
from anomaly_clip.errors import UserError
from anomaly_clip.recording.checkpoint_io import AtomicCheckpointIO
from anomaly_clip.recording.run_conditions import file_sha256
from anomaly_clip.results.folder import find_run

__all__ = [
    "calibration_file",
    "earlier_version",
    "images_of",
    "is_version_of",
    "write_into_checkpoint",
]

EARLIER = "before_calibration"
"""Entry of a checkpoint: its calibration, or None, by the hash of its file, before each new one."""
MAX_EARLIER = 5
"""Number of earlier calibrations that are kept, the newest ones."""


def write_into_checkpoint(calibration: Calibration, checkpoint: Path) -> Path:
    """Write a calibration into a checkpoint, and next to it.

    Args:
        calibration: The calibration.
        checkpoint: The checkpoint, which is replaced atomically.

    Returns:
        The file next to it.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    before = {**content.get(EARLIER, {}), file_sha256(checkpoint): content.get("calibration")}
    content[EARLIER] = dict(list(before.items())[-MAX_EARLIER:])
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
    return isinstance(content, dict) and sha256 in content.get(EARLIER, {})


def earlier_version(checkpoint: Path, sha256: str, folder: Path) -> Path:
    """Return a checkpoint as it was when its file had a hash.

    Args:
        checkpoint: The checkpoint; see :func:`is_version_of`.
        sha256: The hash.
        folder: Folder for a copy with the calibration of that time, if it has another one now.
    """
    if file_sha256(checkpoint) == sha256:
        return checkpoint
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    calibration = content[EARLIER][sha256]
    content.pop("calibration")
    content |= {} if calibration is None else {"calibration": calibration}
    copy = folder / checkpoint.name
    AtomicCheckpointIO().save_checkpoint(content, copy)
    return copy


def images_of(file: Path) -> frozenset[str]:
    """Return the hashes of the images of a calibration.

    Raises:
        UserError: If it cannot be read.
    """
    categories = Calibration.read(file).categories.values()
    return frozenset(image for record in categories for image in record.images)


def calibration_file(value: str) -> Path:
    """Return the file of ``calibration.file``, which may be the folder of a calibrated run.

    Raises:
        UserError: If there is none.
    """
    try:
        path = find_run(Path(value).expanduser())
    except RuntimeError as error:  # ~name of an unknown user
        raise UserError(f"calibration.file {value}: give the full path ({error})") from None
    for file in (path, path / CALIBRATION_FILE, path / "checkpoints" / CALIBRATION_FILE):
        if file.is_file():
            return file
    raise UserError(
        f"calibration.file {value}: there is no {CALIBRATION_FILE}: give that file, or the folder "
        f"of a calibrated run (anomaly_clip calibrate)"
    )
