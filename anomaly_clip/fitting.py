"""Fitting of a detector on a user's own normal images, from Python."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import anomaly_clip.methods as methods
from anomaly_clip.commands.configs import config_file, config_names
from anomaly_clip.commands.experiment import run_experiment
from anomaly_clip.commands.foreign_code import class_in_config
from anomaly_clip.data.folder_forms import NORMAL_FOLDERS
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError
from anomaly_clip.files import name_key
from anomaly_clip.loading import find_device, load_method, option_words, trainer_options
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.python_calls import in_python, unchanged_process

__all__ = ["fit"]

ARGUMENTS = {"data.root": "images", "output.folder": "folder"}
"""Options of the command line that are arguments of :func:`fit`."""

ImagesOfFit = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A folder, or paths of images and folders."""


def fit(
    configuration: str | os.PathLike[str],
    images: ImagesOfFit,
    *,
    folder: str | os.PathLike[str] | None = None,
    category: str | None = None,
    calibrate: bool = True,
    alpha: float | None = None,
    device: str | torch.device | None = None,
    backbone: Mapping[str, Any] | None = None,
    **options: Any,
) -> Detector:
    """Fit a detector on normal images as ``anomaly_clip fit`` does, calibrate it, and load it.

    Args:
        configuration: Name of a method's configuration, such as ``patchcore``: the images are your
            own, so that the settings are those of ``own_patchcore`` if there is one, and otherwise
            the named ones without a crop. A file is used as it is.
        images: Folder of the images in one of the forms of ``docs/howto/own_images.md``; a folder
            called ``good``, ``ok`` or ``normal`` itself; or a list of normal images.
        folder: Folder of the run, which keeps checkpoint and calibration; default: nothing is kept.
        category: Name of the object in the images; default: the name of the folder.
        calibrate: Whether to hold normal images out of the fit, and to calibrate on them.
        alpha: False-alarm rate of decisions; default: 5 %.
        device: See :func:`load`.
        backbone: Settings of the backbone that replace those of the configuration.
        options: Options of the command line; see :func:`load`.

    Raises:
        ValueError: If the user made a mistake; in one sentence, with the way out.
    """
    place = find_device(device)
    if alpha is not None and not calibrate:
        raise ValueError(f"alpha {alpha}: without a calibration nothing is decided; leave it out")
    with in_python(), tempfile.TemporaryDirectory() as temporary:
        name, words = _own_configuration(os.fsdecode(configuration))
        file = Path(config_file(name)).expanduser()
        if file.is_file():
            _check_fitted(name, file)
        words += option_words({} if backbone is None else {"model.backbone": backbone})
        given = option_words(options)
        _check_options(given)
        words += ["--trainer.enable_model_summary=false", *given]
        words += [*_folder_options(images, category, words), *trainer_options(place)]
        words += ["--calibrate=true"] if calibrate else []
        words += [] if alpha is None else [f"--calibration.alpha={alpha}"]
        run = temporary if folder is None else os.fsdecode(folder)
        words.append(f"--output.folder={run}")
        with unchanged_process(silent=False):
            run_experiment(["fit", f"--config={name}", *words])
        loaded = load_method(run, None, place, None, None, {})
    if folder is None:
        loaded.source = "the fit" if _is_several(images) else f"the fit on {images}"
    return Detector(loaded)


def _check_options(words: Sequence[str]) -> None:
    """Check that no option would be replaced by an argument.

    Raises:
        UserError: If one would.
    """
    for option, argument in ARGUMENTS.items():
        if any(word.startswith(f"--{option}=") for word in words):
            raise UserError(f"option {option}: give the argument {argument} of fit instead")


def _own_configuration(name: str) -> tuple[str, list[str]]:
    """Return the configuration that fits a method on a user's own images, and its options.

    Args:
        name: Name of a configuration, or a file, which is used as it is.
    """
    if Path(name).suffix or Path(name).exists() or name not in config_names():
        return name, []
    if name.startswith("own_") or f"own_{name}" in config_names():
        return f"own_{name.removeprefix('own_')}", []
    # Published protocols crop; photographs of one's own are seen as a whole.
    resize = ["--data.resize.rule=square", "--data.resize.size=null"]
    return name, ["--data=ImageFolder", "--data.categories=null", *resize]


def _check_fitted(name: str, file: Path) -> None:
    """Check that a configuration is that of a detector that can be fitted.

    Raises:
        UserError: If it is not.
    """
    kind = getattr(methods, str(class_in_config(file)).rpartition(".")[2], None)
    if isinstance(kind, type) and not (issubclass(kind, AnomalyMethod) and kind.can_be_fitted):
        what = "is zero-shot: load it with anomaly_clip.load, without a fit"
        if not issubclass(kind, AnomalyMethod):
            what = "is no detector: fit one, such as patchcore"
        raise UserError(f"{name}: {kind.__name__} {what}")


def _folder_options(images: ImagesOfFit, category: str | None, words: Sequence[str]) -> list[str]:
    """Return the options of the normal images: those of a folder ``good`` are all normal.

    Args:
        images: The images.
        category: Name of the object; None: that of the folder.
        words: The other options.
    """
    several = not isinstance(images, str | os.PathLike)
    listed = [images] if isinstance(images, str | os.PathLike) else list(images)
    if not all(isinstance(image, str | os.PathLike) for image in listed):
        raise UserError("the images of a fit are files: give their paths, or a folder")
    paths = list(map(os.fsdecode, listed))
    root = [f"--data.root={json.dumps(paths) if several else paths[0]}"]
    folder = Path(paths[0] if paths else "").expanduser().absolute()
    is_good = name_key(folder.name).lower() in NORMAL_FOLDERS
    if (several or is_good) and not any(word.startswith("--data.normal=") for word in words):
        root.append("--data.normal=all")
    if is_good and not several and category is None:
        category = folder.parent.name.replace("_", " ").strip() or None
    return root if category is None else [*root, f"--data.category={category}"]


def _is_several(images: ImagesOfFit) -> bool:
    return not isinstance(images, str | os.PathLike)
