"""Options that name a detector: a run, a checkpoint, or a configuration with its options."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anomaly_clip.methods as methods
from anomaly_clip.commands.checkpoint_option import checkpoint_file, is_last, last_of_runs
from anomaly_clip.commands.configs import config_file
from anomaly_clip.commands.experiment import RUNS
from anomaly_clip.commands.foreign_code import class_in_config
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError
from anomaly_clip.loading import load_method
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import say
from anomaly_clip.results.folder import find_run

__all__ = [
    "DetectorSource",
    "LoadedDetector",
    "add_detector_options",
    "detector_source",
    "split_words",
]

FLOAT32 = "32-true"
"""Precision of Lightning's trainer in which programs are exported."""
BACKBONE = "model.backbone."
DOTTED = ("data.root", "data.category", "calibration.file")
"""Options of the verb whose names look like those of a configuration."""
SETTINGS = ("model", "seed_everything")
"""Options of a configuration whose names do not."""


@dataclass
class LoadedDetector:
    """A detector that was loaded for an export.

    Args:
        detector: The detector, as predict would score with it.
        method: Its method in float32; None if the detector scores in float32 itself.
    """

    detector: Detector
    method: AnomalyMethod | None


@dataclass
class DetectorSource:
    """The detector that a user has named.

    Args:
        name: Path of a run, a checkpoint or a configuration, or name of a configuration.
        checkpoint: The checkpoint; None for a configuration.
        category: Category of the images; None: that of the fit or of the configuration.
        references: Folder of normal images, for methods that compare images with them.
        calibration: Calibration in place of that of the run.
        images: Folder of images on which programs are compared.
        options: Options of the configuration, or of a checkpoint's backbone.
    """

    name: str
    checkpoint: Path | None = None
    category: str | None = None
    references: str | None = None
    calibration: str | None = None
    images: Path | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def backbone(self) -> dict[str, Any] | None:
        """Settings that replace those of a checkpoint's backbone; None without any."""
        if self.checkpoint is None or not self.options:
            return None
        return {name.removeprefix(BACKBONE): value for name, value in self.options.items()}

    def load(self) -> LoadedDetector:
        """Load the detector on the CPU, and its method in float32.

        Raises:
            UserError: If it cannot be loaded.
        """
        options: dict[str, Any] = dict(self.options) if self.checkpoint is None else {}
        source = str(self.checkpoint or self.name)
        load = partial(
            load_method, source, self.category, "cpu", self.backbone, self.references, options
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            loaded = load()
            detector = Detector(loaded, calibration=self.calibration)
            detector.resolve()
            method = None
            if detector.preprocessing.precision != FLOAT32:
                method = load(precision=FLOAT32).method
        for warning in caught:
            if warning.category is UserWarning:
                say(str(warning.message))
        return LoadedDetector(detector, method)


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a detector to the parser of a verb."""
    parser.add_argument("run", nargs="?", help="folder of a run, or a checkpoint")
    parser.add_argument("--ckpt_path", help="the same, or last")
    parser.add_argument("--config", help="configuration of a zero-shot method, such as sdp")
    parser.add_argument(
        "--data.root", dest="root", type=Path, help="folder of images to compare on"
    )
    parser.add_argument("--data.category", dest="category", help="name of the object in the images")
    parser.add_argument("--references", help="folder of normal images, for few-shot methods")
    parser.add_argument(
        "--calibration.file", dest="calibration", help="calibration.json, or a calibrated run"
    )


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the options of a configuration, such as ``--model.sigma 4``, from those of a verb.

    Args:
        words: Words after the verb.

    Returns:
        The words for the parser of the verb, and the options of a configuration by name.

    Raises:
        UserError: If such an option has no value.

    Example:
        >>> from anomaly_clip.commands.detector_options import split_words
        >>> split_words(["--config", "sdp", "--model.sigma", "4", "--data.root=photos"])
        (['--config', 'sdp', '--data.root=photos'], {'model.sigma': '4'})
    """
    own_words: list[str] = []
    settings: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        is_setting = word.startswith("--") and (name in SETTINGS or "." in name)
        if not is_setting or name in DOTTED:
            own_words.append(word)
            continue
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{word}: the value of the option is missing")
            value = rest.pop(0)
        settings[name] = value
    return own_words, settings


def detector_source(options: argparse.Namespace, settings: Mapping[str, str]) -> DetectorSource:
    """Return the detector that a user has named.

    Args:
        options: The parsed options of :func:`add_detector_options`.
        settings: Options of a configuration; see :func:`split_words`.

    Raises:
        UserError: If none was named, or several, or an option does not apply.
    """
    names = [name for name in (options.run, options.ckpt_path, options.config) if name is not None]
    if len(names) != 1:
        given = "nothing was given" if not names else f"{len(names)} were given"
        raise UserError(
            f"name one detector, a run, --ckpt_path or --config: {given}; such as runs/padim/1-fit"
        )
    source = DetectorSource(
        names[0],
        category=options.category,
        references=options.references,
        calibration=options.calibration,
        images=options.root,
        options=dict(settings),
    )
    if options.root is not None and not options.root.exists():
        raise UserError(f"--data.root {options.root}: there is no such folder; correct the path")
    if options.config is not None:
        source.name = config_file(options.config)  # also next to a folder of this name
        _check_zero_shot(options.config, Path(source.name))
        return source
    if _is_zero_shot_run(options.run):
        return source
    source.checkpoint = Path(_checkpoint(names[0]))
    unknown = [name for name in settings if not name.startswith(BACKBONE)]
    if unknown:
        raise UserError(
            f"--{unknown[0]}: a checkpoint keeps the settings of its fit; leave the option out"
        )
    return source


def _check_zero_shot(name: str, file: Path) -> None:
    """Check that the method of a configuration needs no fit, before its weights are loaded.

    Raises:
        UserError: If it needs one.
    """
    path = str(class_in_config(file)) if file.is_file() else ""
    kind: Any = getattr(methods, path.rpartition(".")[2], None)
    is_method = isinstance(kind, type) and issubclass(kind, AnomalyMethod)
    if is_method and kind.must_be_fitted is True:  # of SDP+, it depends on the settings
        raise UserError(
            f"--config {name}: {path.rpartition('.')[2]} must be fitted first: run anomaly_clip "
            f"fit --config {name}, and give its run"
        )


def _is_zero_shot_run(run: str | None) -> bool:
    """Return whether a folder is a run without a checkpoint, of a method that needs no fit."""
    folder = None if run is None else find_run(Path(run))
    if folder is None or not folder.is_dir():
        return False
    checkpoints = [*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")]
    return not checkpoints and any(folder.glob("config-*.yaml"))


def _checkpoint(name: str) -> str:
    return last_of_runs("export", RUNS, None, None) if is_last(name) else checkpoint_file(name)
