"""The experiment verbs: LightningCLI with the traps closed that users fall into."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

# Short names on the command line work for classes that are imported when parsing begins.
import anomaly_clip.data
import anomaly_clip.methods  # noqa: F401
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.errors import UserError, sentence
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.report.writer import RunWriter

__all__ = ["ExperimentCLI", "run_experiment"]


def run_experiment(words: Sequence[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` and return an exit code.

    Raises:
        UserError: What is wrong, where, and the way out.
        KeyboardInterrupt: If the user interrupts.
    """
    _quieten()
    try:
        ExperimentCLI(args=list(words))
    except ArgumentError as error:
        raise UserError(sentence(error, _known_options(words[0]))) from error
    except (ValueError, OSError, MisconfigurationException) as error:
        raise UserError(sentence(error)) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's way to end a run
            raise KeyboardInterrupt from None
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


class RunLogger(CSVLogger):
    """Lightning's CSV logger, in the run's folder once there is one."""

    def __init__(self, writer: RunWriter) -> None:
        super().__init__(save_dir=writer.root)
        self._writer = writer

    @property
    def root_dir(self) -> str:
        """The run's folder."""
        return str(self._writer.folder)

    @property
    def log_dir(self) -> str:
        """Where the log lies."""
        return str(self._writer.folder / "logs")


class ExperimentCLI(LightningCLI):
    """Lightning's command line for the methods and data sets of this project."""

    def __init__(self, args: ArgsType = None) -> None:
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
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run leaves behind."""
        parser.add_lightning_class_args(RunWriter, "output")

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the run's writer prints the table
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # maps of a data set fill the memory
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words; unlike Lightning's, without a look at the words of the process."""
        self.config = parser.parse_args(cast("list[str]", args))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, its writer knowing the complete configuration."""
        verb = str(self.subcommand)
        config = self.config[verb]
        writer: RunWriter = self._get(self.config_init, "output")
        writer.config = self._parser(verb).dump(config, skip_none=False)
        writer.seed = config["seed_everything"]
        if writer.name is None and config.get("config"):
            writer.name = Path(str(config["config"][0])).stem
        if config["trainer"]["logger"] is None:
            kwargs["logger"] = RunLogger(writer) if verb != "predict" else False
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Refuse to fit what has nothing to fit.

        Raises:
            UserError: If the method is zero-shot.
        """
        if isinstance(self.model, AnomalyMethod) and not self.model.can_be_fitted:
            name = type(self.model).__name__
            raise UserError(f"{name} is zero-shot, there is nothing to fit: use test or predict")

    def before_test(self) -> None:
        """See :meth:`_check_checkpoint`."""
        self._check_checkpoint()

    def before_predict(self) -> None:
        """See :meth:`_check_checkpoint`."""
        self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        """Refuse a missing checkpoint, and one for a method that has none.

        Raises:
            UserError: What is wrong with ``--ckpt_path``.
        """
        path = self._get(self.config, "ckpt_path")
        if not isinstance(self.model, AnomalyMethod):
            return
        name = type(self.model).__name__
        if path is None and self.model.must_be_fitted:
            raise UserError(f"{name} must be fitted first: give --ckpt_path FILE of a fit")
        if path is not None and not self.model.can_be_fitted:
            raise UserError(f"{name} is zero-shot and has no checkpoints: leave out --ckpt_path")
        if path is not None and not Path(path).is_file():
            raise UserError(f"--ckpt_path {path}: there is no such file")

    def before_validate(self) -> None:
        """Refuse to validate without a validation split.

        Raises:
            UserError: If the data module has none.
        """
        if isinstance(self.datamodule, AnomalyData) and not self.datamodule.val_dataloader():
            name = type(self.datamodule).__name__
            raise UserError(f"{name} has no validation split: use test")


def _known_options(verb: str) -> list[str]:
    """Return the options of a verb, without those of models and data sets."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(RunWriter, "output")
    own = ["--config", "--seed_everything", "--model", "--data", "--ckpt_path", "--print_config"]
    return own + [f"--{action.dest}" for action in parser._actions if "." in action.dest]


def _quieten() -> None:
    """Silence what says nothing about the run; the writer's start line says the rest."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of a deprecated name
    ):
        warnings.filterwarnings("ignore", message)
