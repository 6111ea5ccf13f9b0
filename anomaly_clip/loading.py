"""A method with everything that it needs to score images, from a checkpoint or a configuration."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomaly_clip.backbones.frozen import check_settings
from anomaly_clip.commands.batch import DryRunCLI
from anomaly_clip.commands.checkpoint_content import DAMAGE, read_checkpoint
from anomaly_clip.commands.checkpoint_option import checkpoint_file, config_of_fit
from anomaly_clip.commands.configs import config_file, config_names
from anomaly_clip.commands.experiment import arrange, class_of_checkpoint
from anomaly_clip.commands.foreign_code import check_found_config, seed_in_config
from anomaly_clip.commands.saved_backbone import changed_backbone, weights_option
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.samples import Sample
from anomaly_clip.decisions.calibration import CALIBRATION_FILE
from anomaly_clip.errors import UserError, reason
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.preprocessing import Preprocessing
from anomaly_clip.python_calls import in_python, unchanged_process
from anomaly_clip.records import Batch
from anomaly_clip.results.folder import find_run

__all__ = [
    "CATEGORY",
    "LoadedMethod",
    "check_category",
    "find_device",
    "load_method",
    "option_words",
    "trainer_options",
]

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
BATCH_SIZE = 16
"""Images per batch without a configuration, as data modules have it."""
NAMES = "words"
"""Option whose keys are names of categories, not options."""
CATEGORY = "object"
"""Name of a category that nobody has named."""


@dataclass
class LoadedMethod:
    """A method that is ready to score images.

    Args:
        method: The method, on its device and attached to a trainer.
        preprocessing: What images go through before.
        category: Category of the images; None if it must be given with them.
        is_named: False if ``category`` is only the name of a folder.
        batch_size: Images per batch.
        references: Data module of the reference images, if there are any.
        source: Description of where it is from, for messages.
        calibration: File of the calibration of a configuration; None without one.
    """

    method: AnomalyMethod
    preprocessing: Preprocessing
    category: str | None
    is_named: bool
    batch_size: int
    references: AnomalyData | None
    source: str
    calibration: str | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer, of which only precision, device and data are used."""
        return self.method.trainer


def load_method(
    source: str | os.PathLike[str] | AnomalyMethod,
    category: str | None,
    device: str | torch.device | None,
    backbone: Mapping[str, Any] | None,
    references: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
    precision: str | None = None,
) -> LoadedMethod:
    """Load a method; see :func:`anomaly_clip.detector.load`.

    ``precision`` is that of the trainer; None: that of the fit or of the configuration.

    Raises:
        ValueError: If the user made a mistake.
    """
    place = find_device(device)
    if category is not None:
        check_category(category)
    if backbone is not None:
        check_settings(backbone, "pretrained")
    with in_python(), unchanged_process():
        if isinstance(source, AnomalyMethod):
            _refuse(options, backbone, "a method in memory keeps its settings")
            loaded = _of_method(source)
        else:
            path = find_run(Path(os.fsdecode(source)).expanduser())
            file = _config_of(path)
            if file is None:
                _refuse(options, None, f"{path} keeps the settings of its fit")
                loaded = _of_checkpoint(Path(checkpoint_file(str(path))), backbone)
            else:
                settings = {**options, **({} if backbone is None else {"model.backbone": backbone})}
                loaded = _of_config(file, category, references, place, settings)
                if path.is_dir():
                    loaded.source = str(path)
        if category is not None:
            loaded.category, loaded.is_named = category, True
        if precision is not None:
            loaded.preprocessing = replace(loaded.preprocessing, precision=precision)
        _attach(loaded, place, references)
    return loaded


def check_category(category: str) -> None:
    """Check the name of a category.

    Raises:
        ValueError: If it is empty, or not a text.
    """
    if not isinstance(category, str) or not category.strip():
        kind = "is empty" if isinstance(category, str) else "is not a text"
        raise ValueError(
            f'category {category!r} {kind}: name the object in the images, such as "plank"'
        )


# -- sources ---------------------------------------------------------------------------------------


def _config_of(path: Path) -> Path | None:
    """Return the configuration that a path or a name refers to; None for a checkpoint.

    Raises:
        UserError: If it is neither of them, nor a folder with one of them.
    """
    if path.is_dir():
        if any(path.glob("*.ckpt")) or any(path.glob("checkpoints/*.ckpt")):
            return None
        configs = [path / f"config-{verb}.yaml" for verb in ("calibrate", "test", "predict")]
        file = next((file for file in configs if file.is_file()), None)
        if file is not None:
            check_found_config(file)
        return file
    if path.is_file():
        if path.name == CALIBRATION_FILE:
            raise UserError(
                f"{path} is a calibration, not a detector: load the run or the configuration that "
                f'it calibrates, with calibration="{path}"'
            )
        return path if path.suffix.lower() in CONFIG_SUFFIXES else None
    file = Path(config_file(str(path)))
    if file.is_file():
        return file
    near = difflib.get_close_matches(str(path), config_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{path}: neither a run, a checkpoint or a configuration file, nor a configuration of the "
        f"package; {hint}anomaly_clip configs lists all configurations"
    )


def _of_method(method: AnomalyMethod) -> LoadedMethod:
    record = method.preprocessing
    name = type(method).__name__
    settings = Preprocessing() if record is None else Preprocessing.of_record(record, None)
    return LoadedMethod(
        method, settings, *_category_of(method, settings), BATCH_SIZE, None, f"this {name}"
    )


def _of_checkpoint(path: Path, backbone: Mapping[str, Any] | None) -> LoadedMethod:
    kind = class_of_checkpoint(path)
    if not issubclass(kind, AnomalyMethod):
        raise UserError(
            f"{path} is a checkpoint of {kind.__name__}, which scores no images: give one of a "
            f"detector"
        )
    content = read_checkpoint(path)
    settings = Preprocessing.of_checkpoint(content, path)
    changed = changed_backbone(kind, content, backbone, path)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(path))  # of a backbone with random weights
            method = kind.load_from_checkpoint(
                path, map_location="cpu", weights_only=True, **changed
            )
    except FileNotFoundError as error:
        message = reason(error)
        moved = re.match(r"backbone\.(\w+) ", message)
        option = weights_option(content) if moved is None else moved[1]
        raise UserError(
            f"{message}; if this file of the backbone has moved, name it with "
            f'backbone={{"{option}": FILE}}, or --model.backbone.{option} FILE'
        ) from None
    except (*DAMAGE, ArgumentError) as error:
        if not kind.__module__.startswith("anomaly_clip."):
            raise
        cause = f"{type(error).__name__}: {reason(error).rstrip(' .:')}"
        raise UserError(
            f"{path}: the checkpoint does not fit {kind.__name__}, or is damaged ({cause}): give "
            f"one that fit has written"
        ) from None
    method.take_fit_record(content)
    if method.fitted_category is None:
        method.fitted_category = content.get("fitted_category")
    category, is_named = _category_of(method, settings)
    return LoadedMethod(method, settings, category, is_named, BATCH_SIZE, None, str(path))


def _seed_of(path: Path) -> int:
    """Return the seed of a fit; without its configuration, that of all configurations."""
    with suppress(UserError):
        return seed_in_config(config_of_fit(path)) or 0
    return 0


def _category_of(method: AnomalyMethod, settings: Preprocessing) -> tuple[str | None, bool]:
    """Return the category of a fit if there was only one, and whether somebody named it."""
    if method.fitted_category is not None:
        return method.fitted_category, settings.is_named
    return (next(iter(settings.words)) if len(settings.words) == 1 else None), settings.is_named


class _LoadingCLI(DryRunCLI):
    """Command line that builds a method without a checkpoint, for its use from Python."""

    def _check_method(self, method: EvaluatedModule, verb: str, path: str | None) -> None:
        if not isinstance(method, AnomalyMethod) or method.must_be_fitted:
            name = type(method).__name__
            raise UserError(
                f"{name} must be fitted first: use anomaly_clip.fit(CONFIGURATION, FOLDER), or "
                f"load the run of a fit"
                if isinstance(method, AnomalyMethod)
                else f"{name} is no detector: load the configuration of one, such as sdp"
            )


def _of_config(
    file: Path,
    category: str | None,
    references: str | os.PathLike[str] | None,
    device: torch.device,
    options: Mapping[str, Any],
) -> LoadedMethod:
    words = option_words(options)
    own_data = any(word.startswith(("--data=", "--data.root=")) for word in words)
    with tempfile.TemporaryDirectory() as empty:
        forced = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.strategy=auto"]
        forced += ["--trainer.plugins=null", "--trainer.profiler=null", "--trainer.num_nodes=1"]
        forced += ["--trainer.deterministic=null", "--trainer.benchmark=null"]
        forced += ["--trainer.fast_dev_run=false", "--output.folder=null", "--ckpt_path=null"]
        forced += trainer_options(device)
        if not own_data:
            root = empty if references is None else os.fsdecode(references)
            words = ["--data=ImageFolder", "--data.categories=null", *words, f"--data.root={root}"]
            words += [] if category is None else [f"--data.category={category}"]
        # The configuration of a test has options that predict does not have.
        verb = "test" if file.name == "config-test.yaml" else "predict"
        cli = _LoadingCLI(arrange([verb, f"--config={file}", *words, *forced]))
        data = cli.datamodule
        settings = Preprocessing.of_data(data, str(cli.trainer.precision))
        if data.has_default_name:
            settings = Preprocessing(**{**vars(settings), "words": {}})
    if data.has_shots and references is None and not own_data:
        raise UserError(
            f"{file.stem} compares images with {data.few_shots.shots or 'some'} reference images: "
            f"give references=FOLDER, a folder of normal images"
        )
    method = cli.model
    assert isinstance(method, AnomalyMethod)
    loaded = LoadedMethod(
        method, settings, *_category_of(method, settings), data.batch_size, None, file.stem
    )
    loaded.references = data if own_data or references is not None else None
    beside = file.parent / CALIBRATION_FILE
    loaded.calibration = cli.writer.calibration.file or (str(beside) if beside.is_file() else None)
    return loaded


def option_words(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return keyword arguments as options of the command line.

    Args:
        options: Values by option; nested settings as mappings.
        prefix: Name of the option that the settings belong to.

    Example:
        >>> from anomaly_clip.loading import option_words
        >>> option_words({"model": {"sigma": 4, "stages": [3, 6]}, "data.bit_depth": 12})
        ['--model.sigma=4', '--model.stages=[3, 6]', '--data.bit_depth=12']
        >>> option_words({"model": {"class_path": "SDP", "init_args": {"sigma": 4}}})
        ['--model=SDP', '--model.sigma=4']
    """
    words = []
    for name, value in options.items():
        option = prefix if name in ("class_path", "init_args") else f"{prefix}.{name}".lstrip(".")
        if isinstance(value, Mapping) and option.rpartition(".")[2] != NAMES:
            words += option_words(value, option)
        elif isinstance(value, str | os.PathLike):
            words.append(f"--{option}={os.fsdecode(value)}")
        else:
            words.append(f"--{option}={json.dumps(value, default=str)}")
    return words


def _refuse(options: Mapping[str, Any], backbone: Mapping[str, Any] | None, why: str) -> None:
    given = [*options, *([] if backbone is None else ["backbone"])]
    if given:
        raise UserError(
            f"option {given[0]}: {why}; options are for the name or file of a configuration"
        )


# -- devices, trainers and data --------------------------------------------------------------------


def find_device(device: str | torch.device | None) -> torch.device:
    """Return a device; by default the one that Lightning's trainer chooses.

    Raises:
        ValueError: If it is unknown, or not there.
    """
    available = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    if device is None:
        return torch.device((*available, "cpu")[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", *available):
        raise ValueError(f"device {device} is not available: give {', '.join(['cpu', *available])}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device}: there are only {torch.cuda.device_count()} of cuda")
    return chosen


def trainer_options(device: torch.device) -> list[str]:
    """Return the options of a trainer that uses one device."""
    devices = f"[{device.index}]" if device.type == "cuda" and device.index is not None else "1"
    return [f"--trainer.accelerator={device.type}", f"--trainer.devices={devices}"]


class _DetectorData:
    """Stand-in for a method's data module while it scores images.

    Args:
        settings: Names of the data set and of its categories.
        category: The category that is prepared.
        references: Data module of the reference images, if there are any.
    """

    auxiliary = None
    has_labels = False

    def __init__(
        self, settings: Preprocessing, category: str, references: AnomalyData | None
    ) -> None:
        self.dataset_name = settings.data
        self.categories = self.train_categories = [category]
        self._words = settings.words
        self._references = references
        self.has_shots = references is not None and references.has_shots

    def words(self, category: str) -> str:
        return self._words.get(category, category)

    def validation_categories(self) -> list[str]:
        return self.categories

    def drawn_of(self, category: str, count: int, seed: int) -> list[Sample]:
        return self._source().drawn_of(category, count, seed)

    def references(self, category: str, count: int | None = None, seed: int = 0) -> Batch:
        return self._source().references(category, count, seed)

    def _source(self) -> AnomalyData:
        if self._references is None:
            raise ValueError(
                "the method compares images with reference images: give references=FOLDER, a "
                "folder of normal images"
            )
        return self._references


def _attach(
    loaded: LoadedMethod, device: torch.device, folder: str | os.PathLike[str] | None
) -> None:
    """Prepare a method as the beginning of predict does, on its device."""
    method, settings = loaded.method, loaded.preprocessing
    devices: Any = [device.index] if device.type == "cuda" and device.index is not None else 1
    trainer = Trainer(
        accelerator=device.type,
        devices=devices,
        precision=settings.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[LightningEnvironment()],
    )
    trainer.state.fn = TrainerFn.PREDICTING
    trainer.strategy.connect(method)
    method.trainer = trainer
    category = loaded.category or CATEGORY
    needs = method.loader_needs
    has_shots = loaded.references is not None and loaded.references.has_shots
    # With a fit, all images of the folder are references.
    takes_all = folder is not None and loaded.references is None and needs.shots == "references"
    uses_references = takes_all or has_shots or bool(needs.support_images)
    if folder is not None and not uses_references:
        raise UserError(
            f"references {os.fsdecode(folder)}: {type(method).__name__} of {loaded.source} uses no "
            f"reference images: leave them out, or set data.shots for a method that can"
        )
    if uses_references and method.uses_category_names and loaded.category is None:
        raise UserError(
            f"{loaded.source} compares images with references of one category: name it, such as "
            f'category="laser-cut plank"'
        )
    if folder is not None and loaded.references is None:
        shared: dict[str, Any] = {"num_workers": 0, "fraction": 1.0 if takes_all else None}
        shared |= {"resize": settings.resize, "max_pixels": settings.max_pixels}
        loaded.references = ImageFolder(os.fsdecode(folder), category, **shared)
    references = loaded.references
    if references is not None and uses_references:
        if isinstance(references, ImageFolder):
            references.normal = "all"
        references.trainer = trainer
        references.setup("predict")
        if needs.support_images:
            references.begin_fit()  # lists the images to draw from
    data = _DetectorData(settings, category, references)
    trainer.datamodule = data  # type: ignore[attr-defined]
    method.setup("predict")
    trainer.precision_plugin.convert_module(method)
    method.to(device).eval()
    with torch.inference_mode():
        method.prepare([] if loaded.category is None else [category])
