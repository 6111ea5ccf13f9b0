"""``load``: detectors from runs, checkpoints and configurations, and from exported folders.

The import of this module takes no time: torch is imported for the first three only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import torch

    import anomaly_clip.runtime.detector as runtime
    from anomaly_clip.detector import CalibrationSource, Detector
    from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["load"]

RECORD = "detector.json"
"""File of every exported folder."""
RUNTIME_OPTIONS = ("runtime", "threads", "bit_depth")
"""Arguments for exported folders."""


@overload
def load(
    source: AnomalyMethod,
    *,
    category: str | None = ...,
    calibration: CalibrationSource | None = ...,
    alpha: float | None = ...,
    device: str | torch.device | None = ...,
    backbone: Mapping[str, Any] | None = ...,
    references: str | os.PathLike[str] | None = ...,
    **options: Any,
) -> Detector: ...


@overload
def load(
    source: str | os.PathLike[str],
    *,
    category: str | None = ...,
    calibration: CalibrationSource | None = ...,
    alpha: float | None = ...,
    device: str | torch.device | None = ...,
    backbone: Mapping[str, Any] | None = ...,
    references: str | os.PathLike[str] | None = ...,
    **options: Any,
) -> Any: ...  # a Detector, or that of an exported folder


def load(
    source: str | os.PathLike[str] | AnomalyMethod,
    *,
    category: str | None = None,
    calibration: CalibrationSource | None = None,
    alpha: float | None = None,
    device: str | torch.device | None = None,
    backbone: Mapping[str, Any] | None = None,
    references: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Load a detector, which scores images as ``anomaly_clip predict`` does.

    Images go through what the checkpoint, the configuration or the export says: size, resize rule,
    bit depth and precision are not the caller's choice.

    Args:
        source: Folder of a run, checkpoint, name of a configuration of the package such as ``sdp``,
            configuration file, or a method in memory. Configurations are for methods that need no
            fit. The images are the caller's own, whatever data set a configuration names. Or a
            folder that ``anomaly_clip export`` has written, which needs no torch.
        category: Name of the object in the images, for methods with prompts; default: that of the
            fit or of the configuration.
        calibration: Calibration that decides; default: the one in the checkpoint or the run's
            folder, if any.
        alpha: False-alarm rate of decisions; default: the first one of the calibration.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; default: a GPU if there is one.
        backbone: Settings of the backbone that replace the stored ones, such as the path of weights
            that have moved; other weights than those of the fit are refused.
        references: Folder with normal images, for methods that compare images with them.
        options: Options of the command line for a configuration, such as ``model={"sigma": 4}``, or
            with dots, ``**{"model.sigma": 4}``. For an exported folder: ``runtime``, ``threads``
            and ``bit_depth`` of :class:`anomaly_clip.runtime.detector.Detector`.

    Returns:
        A :class:`anomaly_clip.detector.Detector`; for an exported folder, its runtime's
        ``Detector``, whose ``predict`` returns the same.

    Raises:
        ValueError: If the source cannot be loaded, or the calibration does not fit it; in one
            sentence, with the way out.
    """
    folder = _exported(source)
    if folder is not None:
        fixed = {
            "calibration": calibration,
            "device": device,
            "backbone": backbone,
            "references": references,
        }
        fixed |= {name: value for name, value in options.items() if name not in RUNTIME_OPTIONS}
        return _load_exported(folder, category, alpha, fixed, options)
    from anomaly_clip.detector import load as load_with_torch

    return load_with_torch(
        source,
        category=category,
        calibration=calibration,
        alpha=alpha,
        device=device,
        backbone=backbone,
        references=references,
        **options,
    )


def _exported(source: object) -> Path | None:
    """Return the folder of an exported detector; None for other sources."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(os.fsdecode(source)).expanduser()
    if path.name == RECORD and not path.is_dir():
        return path.parent
    return path if (path / RECORD).is_file() else None


def _load_exported(
    folder: Path,
    category: str | None,
    alpha: float | None,
    fixed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> runtime.Detector:
    """Load an exported detector.

    Args:
        folder: The folder.
        category: Category that it must have.
        alpha: See :func:`load`.
        fixed: Arguments that an export has settled; all must be None.
        options: Further arguments of :func:`load`.

    Raises:
        ValueError: If an argument is not None, or does not fit the folder.
    """
    from anomaly_clip.runtime.detector import Detector

    for name, value in fixed.items():
        if value is not None:
            raise ValueError(
                f"{name} cannot be changed in an exported folder, {folder}: leave it out, or load "
                f"the run, and export it again"
            )
    chosen = {name: options[name] for name in RUNTIME_OPTIONS if name in options}
    detector = Detector(folder, alpha=alpha, **chosen)
    if category not in (None, detector.category):
        raise ValueError(
            f"category {category}: the detector in {folder} is of {detector.category}: leave "
            f"category out, or export one for each category"
        )
    return detector
