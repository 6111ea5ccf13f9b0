"""Experiment verbs (fit, validate, test, predict): LightningCLI with checks for common mistakes."""

from __future__ import annotations

import importlib
import shlex
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

import anomaly_clip.data as data_sets
import anomaly_clip.methods as methods
from anomaly_clip.callbacks import BatchNormStatistics, progress_of_loops
from anomaly_clip.commands.calibration_options import (
    add_calibration_options,
    check_calibration_options,
)
from anomaly_clip.commands.changed_options import changed_options
from anomaly_clip.commands.checkpoint_content import (
    damage_explained,
    method_class,
    read_checkpoint,
)
from anomaly_clip.commands.checkpoint_option import (
    check_resumable,
    checkpoint_file,
    completed,
    config_of_fit,
    is_last,
    last_of_runs,
    missing_checkpoint,
)
from anomaly_clip.commands.configs import expand_configs
from anomaly_clip.commands.divergence import FiniteValues
from anomaly_clip.commands.fit_calibration import (
    calibrate_fit,
    check_kept,
    prepare_data,
)
from anomaly_clip.commands.foreign_code import check_found_config, class_in_config
from anomaly_clip.commands.interruption import advise, stop_if_interrupted
from anomaly_clip.commands.last_step import LastStep, last_checkpoint
from anomaly_clip.commands.library_messages import quieten, summary_options
from anomaly_clip.commands.option_parser import OptionParser, check_used, import_classes
from anomaly_clip.commands.process_failure import report_once
from anomaly_clip.commands.saved_settings import are_equal, comparable, take_activation
from anomaly_clip.commands.yaml_names import read_any_name
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.progress import say, silence
from anomaly_clip.recording.checkpoint_io import remove_leftovers, save_atomically
from anomaly_clip.recording.checkpointing import last_checkpoint_of
from anomaly_clip.recording.run_log import RunLogger
from anomaly_clip.recording.wandb_log import finish_wandb_run
from anomaly_clip.recording.writer import RunWriter
from anomaly_clip.records import HasLoaderNeeds, LoaderNeeds

__all__ = [
    "RUNS",
    "UNREADABLE",
    "ExperimentCLI",
    "arrange",
    "class_of_checkpoint",
    "known_options",
    "option_value",
    "run_experiment",
]

FIT_RECORD = ("fitted_images", "validated_images", "bit_depth", "calibration", "started_from")
"""Entries of a checkpoint that data modules need before Lightning loads it."""
ANOMALOUS_FOUND = 3
"""Exit code of a predict that found anomalous images, if ``output.fail_on`` asks for it."""
UNREADABLE = 1
"""Exit code of a run that is done, but could not read some images."""
OUTPUT = ("root", "name", "folder")
"""Options of the output that decide where a run is written."""
RUNS = "runs"
"""Default of ``output.root``."""
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""Method that a model must override to support a verb."""


def run_experiment(words: Sequence[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        0; 3 if an image is anomalous, for ``output.fail_on anomalous``; or 1 if some images could
        not be read.

    Raises:
        UserError: If the user made a mistake.
        ProcessFailure: If one of several processes fails.
        SystemExit: After a help text, or if a signal interrupts a run.
    """
    quieten()
    try:
        with user_errors(known_options), finish_wandb_run():
            cli = ExperimentCLI(args=arrange(words, resumes=True))
    finally:
        silence(False)  # later runs of this process may show progress
    if not cli.trainer.is_global_zero:  # a launcher would take the code for a failure
        return 0
    fails = words[0] == "predict" and cli.writer.fail_on == "anomalous"
    if fails and cli.writer.num_anomalous:
        return ANOMALOUS_FOUND
    return UNREADABLE if cli.writer.unreadable.exist else 0


def arrange(words: Sequence[str], resumes: bool = False) -> list[str]:
    """Put ``--config`` first; if only a checkpoint is given, add the configuration of its fit.

    A configuration would silently override options that precede it.

    Args:
        words: Arguments after ``anomaly_clip``, the verb first.
        resumes: Whether a checkpoint alone is enough for ``fit``, too.

    Example:
        >>> from anomaly_clip.commands.experiment import arrange
        >>> arrange(["test", "--seed_everything", "5", "--config", "a.yaml"])
        ['test', '--config', 'a.yaml', '--seed_everything', '5']

    Raises:
        UserError: If only a checkpoint is given, and no configuration is stored with it.
    """
    verb, *rest = expand_configs(words)
    files: list[str] = []
    others: list[str] = []
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-c") and rest:
            files += [word, rest.pop(0)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    checkpoint = option_value(others, "--ckpt_path")
    is_enough = verb != "fit" or resumes
    if is_enough and checkpoint and not files and option_value(others, "--model") is None:
        if is_last(checkpoint):
            root, name, folder = (option_value(others, f"--output.{n}") for n in OUTPUT)
            checkpoint = last_of_runs(verb, root or RUNS, name, folder)
            others += ["--ckpt_path", checkpoint]
        # The results get their own run folder instead of the fit's.
        config = config_of_fit(Path(checkpoint_file(checkpoint)))
        check_found_config(config)
        files = ["--config", str(config), "--output.folder", "null"]
        if verb != "fit":  # decisions are made at the rate of the latest calibration
            files += ["--calibration.alpha", "null", "--calibration.confidence", "null"]
    return [verb, *files, *others]


def option_value(words: Sequence[str], name: str) -> str | None:
    """Return the value of an option, or None if it is absent."""
    for word, following in zip_longest(words, words[1:]):
        if word.startswith(f"{name}="):
            return str(word).partition("=")[2]
        if word == name:
            return following
    return None


class ExperimentCLI(LightningCLI):
    """Lightning's command line for the methods and data sets of this project."""

    run_verb: ClassVar[str | None] = None
    """Verb in the name of the run's folder; default: that of Lightning."""

    def __init__(self, args: Sequence[str]) -> None:
        read_any_name()
        import_classes(methods, data_sets)
        self._verb = args[0]
        self._fit_record: dict[str, Any] = {}
        self._is_fitted = False
        self._unfitted: AnomalyMethod | None = None
        self._resumed: tuple[str, dict[str, Any]] | None = None
        """Checkpoint that a fit resumes from: its file, and its progress."""
        self._typed = args
        options = [word for word in args if word.startswith("--")]
        self._num_overrides = sum(not word.startswith("--config") for word in options)
        super().__init__(
            model_class=LightningModule,
            datamodule_class=AnomalyData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,  # the run's writer saves it
            parser_kwargs={
                "prog": "anomaly_clip",
                "allow_abbrev": False,
                "exit_on_error": False,
            },
            parser_class=OptionParser,
            args=list(args),
        )

    @property
    def writer(self) -> RunWriter:
        """Writer of the run folder."""
        writer: RunWriter = self._get(self.config_init, "output")
        return writer

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the requested verb: building a parser takes a tenth of a second per verb."""
        verbs = LightningCLI.subcommands()
        return {self._verb: verbs[self._verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run folder and of decisions."""
        parser.add_lightning_class_args(RunWriter, "output")
        add_calibration_options(parser)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the run's writer prints the table
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # the maps would fill the memory
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments; unlike Lightning's version, ignore ``sys.argv``.

        Raises:
            UserError: If the checkpoint is a folder from which none can be chosen.
        """
        self.config = parser.parse_args(cast("list[str]", args))
        options = self.config[self._verb]
        check_used(self._typed, options)
        value = options.get("ckpt_path")
        if value and is_last(str(value)):
            root, name, folder = (options["output"][n] for n in OUTPUT)
            name = name or self._name_of_config(options)
            options["ckpt_path"] = last_of_runs(self._verb, root, name, folder)
        elif value:
            options["ckpt_path"] = checkpoint_file(str(value))

    @staticmethod
    def _name_of_config(options: Namespace) -> str:
        """Return the name of the runs: that of the configuration, or of the method's class."""
        files = options.get("config") or []
        method = str(options["model"]["class_path"]).rpartition(".")[2]
        return Path(str(files[0])).stem if files else method

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, and pass the complete configuration to the run writer."""
        verb = str(self.subcommand)
        if isinstance(self.model, AnomalyMethod) and verb != "fit":
            # Lightning loads the checkpoint after the data module has listed its images.
            self.model.take_fit_record(self._fit_record)
        self._check_verb(verb)
        config = self.config[verb]
        files = [str(file) for file in config.get("config") or []]
        writer = self.writer
        if writer.name is None:
            writer.name = config["output"]["name"] = self._name_of_config(config)
        writer.verb = self.run_verb or verb
        writer.config = self._parser(verb).dump(config, skip_none=False)
        writer.sources = f"{', '.join(files) or 'no file'} + {self._num_overrides} overrides"
        writer.resumed = config.get("ckpt_path") is not None
        writer.seed = None if config["seed_everything"] is False else config["seed_everything"]
        writer.calibration = self._get(self.config_init, "calibration")
        if config["trainer"]["logger"] is None:
            kwargs["logger"] = RunLogger(writer, verb) if verb != "predict" else False
        callbacks = list(self._get(self.config_init, "trainer")["callbacks"] or [])
        shows_progress = config["trainer"]["enable_progress_bar"] is not False
        silence(not shows_progress)
        if shows_progress and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(progress_of_loops())
        check_calibration_options(verb, self._typed, config)
        self._unfitted = prepare_data(verb, config["calibrate"], self, writer.calibration)
        if verb == "fit":
            keeps = config["trainer"]["enable_checkpointing"] is not False
            callbacks += last_checkpoint_of(callbacks, writer.checkpoint_every_n_steps, keeps)
            statistics = BatchNormStatistics(config["trainer"]["sync_batchnorm"])
            callbacks += [FiniteValues(), statistics]
        callbacks.append(LastStep())
        kwargs |= {"callbacks": callbacks, **summary_options(config["trainer"], callbacks)}
        if verb != "fit":  # nothing is saved, whatever the configuration of the fit requests
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need.*")
            kwargs["enable_checkpointing"] = False
            kwargs["callbacks"] = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        needs = self.model.loader_needs if isinstance(self.model, HasLoaderNeeds) else None
        if needs is not None and needs.single_pass and config["trainer"]["max_epochs"] is None:
            kwargs["max_epochs"] = 1
        trainer = super().instantiate_trainer(**kwargs)
        save_atomically(trainer)
        if verb == "fit" and config["calibrate"]:
            check_kept(trainer)
        if verb == "fit" and self._resumed is not None:
            path, checkpoint = self._resumed
            remove_leftovers(Path(path).parent)
            method = type(self.model).__name__
            check_resumable(path, checkpoint, needs or LoaderNeeds(), method, trainer)
            changed = changed_options(Path(path), writer.config)
            if changed:
                say(f"options of the fit of {path} differ: {', '.join(changed)}")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(writer.folder / "checkpoints")
            if isinstance(callback, ModelCheckpoint):
                remove_leftovers(Path(str(callback.dirpath)))
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; see :meth:`_compare_with_checkpoint`."""
        with damage_explained(self.config[self.config.subcommand].get("ckpt_path"), None):
            self._compare_with_checkpoint()

    def _compare_with_checkpoint(self) -> None:
        """Check that the requested model is that of the checkpoint.

        Lightning would silently use the model settings of the checkpoint.

        Raises:
            UserError: If they differ.
        """
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if not path or not Path(path).is_file():
            return  # _check_verb reports a missing file
        checkpoint = read_checkpoint(Path(path))
        self._fit_record = {name: checkpoint[name] for name in FIT_RECORD if name in checkpoint}
        if self._verb == "fit":
            keys = ("loops", "global_step", "optimizer_states")
            progress = {key: checkpoint[key] for key in keys if key in checkpoint}
            self._resumed = str(path), progress
        saved = dict(checkpoint.get("hyper_parameters", {}))
        model_class = config["model"]["class_path"]
        saved_class = saved.pop("_class_path", model_class)
        if saved_class.rpartition(".")[2] != model_class.rpartition(".")[2]:
            raise UserError(
                f"--ckpt_path {path} is a checkpoint of {saved_class}, but the model is "
                f"{model_class}: change --model or --ckpt_path"
            )
        kind = _class_of(model_class)
        contract = kind if issubclass(kind, EvaluatedModule) else AnomalyMethod
        for name in contract.init_only_arguments:
            if (given := config["model"]["init_args"].get(name)) is not None:
                say(f"model.{name} {given} is not used: --ckpt_path {path} has trained weights")
            config["model"]["init_args"][name] = None  # the checkpoint stores the effect
        arguments = config["model"].get("init_args", Namespace()).as_dict()
        for name, value in arguments.items():
            if name in contract.inference_arguments or name not in saved:
                continue
            take_activation(config["model"]["init_args"], name, saved[name])
            saved[name] = completed(kind, name, saved[name])
            is_hashed = issubclass(kind, AnomalyMethod)
            fitted, value = (comparable(v, name, is_hashed) for v in (saved[name], value))
            if not are_equal(fitted, value):
                raise UserError(
                    f"model.{name} is {value}, but {path} was fitted with {fitted}: leave the "
                    f"option out, or fit again"
                )

    def _check_verb(self, verb: str) -> None:
        """Check that method, data and checkpoint support the verb, before anything is written.

        Raises:
            FileNotFoundError: If the folder of the data set is missing.
            UserError: If they do not.
        """
        self.datamodule.check_root()
        if verb == "fit" and self.datamodule.auxiliary is not None:
            self.datamodule.auxiliary.check_root()  # a test does without it
        if verb == "validate" and not self.datamodule.validation.exists:
            raise UserError(
                f"{type(self.datamodule).__name__} has no validation split: use test, or choose "
                f"a split with data.val_split"
            )
        name, path = type(self.model).__name__, self._get(self.config, "ckpt_path")
        if isinstance(self.model, EvaluatedModule):
            self._check_method(self.model, verb, path)
        elif verb != "fit" and not is_overridden(STEPS[verb], self.model):
            raise UserError(f"{name} scores no images: use fit")
        if path is not None and not Path(path).is_file():
            raise missing_checkpoint(Path(path))

    def _check_method(self, method: EvaluatedModule, verb: str, path: str | None) -> None:
        name = type(method).__name__
        for declared in ("must_be_fitted", "can_be_fitted"):
            if not hasattr(type(method), declared):
                raise UserError(
                    f"{name} does not declare {declared}: set it to True or False in the body of "
                    f"the class"
                )
        if verb == "fit":
            if not method.can_be_fitted:
                raise UserError(f"{name} is zero-shot and has nothing to fit: use test or predict")
        elif path is None and method.must_be_fitted:
            weights = "".join(f", or --model.{file} FILE" for file in method.init_only_arguments)
            raise UserError(
                f"{name} must be fitted first: give a checkpoint of a fit with --ckpt_path FILE"
                f"{weights}"
            )
        elif path is not None and not method.can_be_fitted:
            raise UserError(
                f"--ckpt_path {path}: {name} is zero-shot and has no checkpoints: leave it out"
            )

    def after_fit(self) -> None:
        """Save the last step as ``last.ckpt``: a fit may end between two automatic saves."""
        file = last_checkpoint(self.trainer)
        trained = self.trainer.fit_loop.total_batch_idx >= 0  # False if limits left no batch
        if file is not None and trained:
            self.trainer.save_checkpoint(file)
        self._is_fitted = True
        if self.config[self._verb]["calibrate"] and trained:
            calibrate_fit(self.trainer, self.model, self.datamodule, self.writer, self._unfitted)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; after a signal, raise ``Interrupted`` with the way to continue.

        Raises:
            ProcessFailure: If one of several processes fails.
        """
        path = self._get(self.config, "ckpt_path")
        with (
            report_once(self.trainer, subcommand, self.writer.abandon),
            user_errors(known_options),
            advise(self._next_command),
            damage_explained(path, self.model),
        ):
            super()._run_subcommand(subcommand)
            stop_if_interrupted()

    def _next_command(self) -> str:
        """Return how to continue after an interruption."""
        file = last_checkpoint(self.trainer) if self._verb == "fit" else None
        if file is None or not file.is_file():
            return "run the same command again"
        if self._is_fitted:
            return f"the fit is complete; test it with --ckpt_path {shlex.quote(str(file))}"
        return f"continue with the same command and --ckpt_path {shlex.quote(str(file))}"

    def after_test(self) -> None:
        """See :meth:`_check_scored`."""
        self._check_scored()

    def after_predict(self) -> None:
        """See :meth:`_check_scored`."""
        self._check_scored()

    def _check_scored(self) -> None:
        """Check that at least one image was scored.

        Raises:
            UserError: If the limits of the trainer left no images.
        """
        writer = self.writer
        if isinstance(self.model, EvaluatedModule) and not writer.num_scored:
            writer.abandon()
            option = f"trainer.limit_{self._verb}_batches"
            limit = getattr(self.trainer, option.partition(".")[2])
            raise UserError(f"no image was scored, because {option} is {limit}: increase it")


def _class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def class_of_checkpoint(path: Path) -> type[LightningModule]:
    """Return the class of the method that wrote a checkpoint.

    Raises:
        UserError: If the class cannot be determined.
    """
    if not path.is_file():
        raise missing_checkpoint(path)
    name = read_checkpoint(path).get("hyper_parameters", {}).get("_class_path")
    if name is not None:
        return method_class(name, path, "its _class_path")
    file = config_of_fit(path)  # written by Python code, without the command line
    return method_class(class_in_config(file), path, f"the class in {file}")


def known_options() -> list[str]:
    """Return the options that all verbs share, without those of models and data sets."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(RunWriter, "output")
    names = ("config", "seed_everything", "model", "data", "ckpt_path", "print_config")
    verb_options = [f"--{name}" for name in names]
    return verb_options + [f"--{action.dest}" for action in parser._actions if "." in action.dest]
