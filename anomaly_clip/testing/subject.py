"""The method under test: its settings, a small data set, and the runs that its checks share."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import random
import shutil
import tempfile
import unittest
import weakref
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor

from anomaly_clip.cli import main
from anomaly_clip.commands.batch import DryRunCLI
from anomaly_clip.commands.experiment import ExperimentCLI, arrange, known_options
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.files import CACHE_VARIABLE
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.records import HasLoaderNeeds, LoaderNeeds, Scores
from anomaly_clip.testing.images import NAMES, write_images

__all__ = [
    "Finished",
    "Flat",
    "Scorer",
    "Subject",
    "class_path",
    "flat",
    "parameters",
    "plain",
    "recorded_arguments",
]

LIMITS = {"max_epochs", "max_steps"}
EPOCHS = 2
"""Epochs of a fit by gradient descent, unless the caller sets a limit."""
MOST_IMAGES = 6
"""Number of test images that are scored in memory."""


Flat = dict[str, Tensor]
"""Tensors of ``Scores`` by name."""


class Finished(NamedTuple):
    """A finished command."""

    code: int
    stdout: str
    stderr: str
    folder: Path
    """Folder of the run, which need not exist."""

    @property
    def last_line(self) -> str:
        """Last line on standard error."""
        return (self.stderr.strip().splitlines() or [""])[-1]


class Scorer(NamedTuple):
    """A method as a run leaves it after its test, and test images to score with it."""

    method: AnomalyMethod
    images: Tensor
    """uint8 ``(B, 3, H, W)``, at most six."""
    categories: list[str]
    paths: list[str]

    def score(self, images: Tensor | None = None, categories: list[str] | None = None) -> Flat:
        """Score images without gradients; default: all.

        The maps of intermediate steps are entries such as ``stage_maps.coarse``.
        """
        images = self.images if images is None else images
        with torch.no_grad():
            return flat(self.method.score(images, (categories or self.categories)[: len(images)]))


T = TypeVar("T")


class shared(cached_property[T]):
    """A cached property that also keeps its failure: a fit that failed is not run again."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the value, or raise the exception of the first time."""
        if instance is None:
            return self
        failures: dict[str | None, tuple[Exception, TracebackType | None]] = instance._failures
        if self.attrname in failures:
            error, trace = failures[self.attrname]
            raise error.with_traceback(trace)
        try:
            return super().__get__(instance, owner)
        except Exception as error:
            failures[self.attrname] = error, error.__traceback__
            raise


@dataclass
class Subject:
    """A method under test; everything is made when a check first needs it.

    Args:
        kind: Class of the method.
        arguments: Arguments of its constructor, as plain values.
        data_options: Options of the data module; see :func:`check_method`.
        trainer_options: Options of the trainer.
        half_precision_bound: See :func:`check_method`.
    """

    kind: type[LightningModule]
    arguments: dict[str, Any]
    data_options: dict[str, Any]
    trainer_options: dict[str, Any]
    half_precision_bound: float
    _number: int = field(default=0, init=False)
    _failures: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        method: LightningModule | type[LightningModule],
        arguments: Mapping[str, Any] | None,
        data: Mapping[str, Any] | None,
        trainer: Mapping[str, Any] | None,
        half_precision_bound: float,
    ) -> Subject:
        """Return the subject of :func:`check_method`.

        Raises:
            ValueError: If the method is none, or the command line cannot name its class.
        """
        instance = method if isinstance(method, LightningModule) else None
        kind = method if isinstance(method, type) else type(method)
        if not issubclass(kind, LightningModule):
            raise ValueError(
                f"check_method: expected a class derived from AnomalyMethod, or an instance of "
                f"one, got {method!r}"
            )
        if inspect.isabstract(kind):
            lacking = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
            raise ValueError(f"check_method: {kind.__name__} does not implement {lacking}")
        class_path(kind)
        recorded = {} if instance is None else recorded_arguments(instance)
        options = plain({**recorded, **(arguments or {})})
        bound = half_precision_bound
        return cls(kind, options, plain(data or {}), plain(trainer or {}), bound)

    # -- traits ----------------------------------------------------------------------------------

    @shared
    def built(self) -> LightningModule:
        """The method as the command line builds it for a fit; not to be changed."""
        return self.build()

    @property
    def scores(self) -> bool:
        """True if the method is a detector."""
        return issubclass(self.kind, AnomalyMethod)

    @property
    def can_be_fitted(self) -> bool:
        """True if the method supports ``fit``."""
        return not isinstance(self.built, EvaluatedModule) or self.built.can_be_fitted

    @property
    def must_be_fitted(self) -> bool:
        """True if the method cannot be tested without a checkpoint."""
        return isinstance(self.built, EvaluatedModule) and self.built.must_be_fitted

    @property
    def is_trained(self) -> bool:
        """True if the method is fitted by gradient descent."""
        return self.can_be_fitted and not self.needs.single_pass

    @property
    def is_transductive(self) -> bool:
        """True if a score depends on the other images."""
        return issubclass(self.kind, AnomalyMethod) and self.kind.transductive

    @property
    def needs(self) -> LoaderNeeds:
        """Requirements of the method on its loaders."""
        method = self.built
        return method.loader_needs if isinstance(method, HasLoaderNeeds) else LoaderNeeds()

    def require(self, condition: bool, reason: str) -> None:
        """Skip a check that does not apply.

        Raises:
            unittest.SkipTest: If the condition is not met.
        """
        if not condition:
            raise unittest.SkipTest(f"{self.kind.__name__} {reason}")

    # -- configuration and data --------------------------------------------------------------------

    @cached_property
    def folder(self) -> Path:
        """Temporary folder of this subject, removed with it."""
        folder = Path(tempfile.mkdtemp(prefix="anomaly_clip_contract_")).resolve()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def root(self) -> Path:
        """Folder of the default data set."""
        return write_images(self.folder / "images")

    @cached_property
    def data(self) -> dict[str, Any]:
        """Section ``data`` of the configuration."""
        if "class_path" in self.data_options:
            chosen = self.data_options
            options = chosen.get("init_args", {})
            return {**chosen, "init_args": {"num_workers": 0, **options}}
        is_single = issubclass(self.kind, AnomalyMethod) and self.kind.one_category
        options = {"root": str(self.root), "num_workers": 0, "batch_size": 4}
        options |= {"categories": list(NAMES[:1])} if is_single else {}
        return {"class_path": "MVTecAD", "init_args": {**options, **self.data_options}}

    def configuration(self) -> dict[str, Any]:
        """Return the configuration of all runs, without their folders and limits."""
        trainer = {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
        }
        return {
            "model": {"class_path": class_path(self.kind), "init_args": deepcopy(self.arguments)},
            "data": deepcopy(self.data),
            "trainer": {**trainer, **self.trainer_options},
        }

    def write(self, content: Mapping[str, Any]) -> Path:
        """Write a configuration and return its file."""
        self._number += 1
        file = self.folder / "configurations" / f"{self._number}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
        return file

    def words(self, verb: str, *more: str, **trainer: Any) -> tuple[list[str], Path]:
        """Return a command line without ``anomaly_clip``, and the folder of its run.

        Args:
            verb: The verb.
            more: Further options.
            trainer: Options that override those of the trainer.
        """
        content = self.configuration()
        if verb == "fit" and self.is_trained and not LIMITS & set(self.trainer_options):
            content["trainer"]["max_epochs"] = EPOCHS
        content["trainer"] |= trainer
        file = self.write(content)
        folder = self.folder / "runs" / file.stem
        if verb != "fit" and self.must_be_fitted and "--ckpt_path" not in more:
            more = ("--ckpt_path", str(self.checkpoint), *more)
        return [verb, "--config", str(file), "--output.folder", str(folder), *more], folder

    def with_callback(self, callback: type, **arguments: Any) -> dict[str, Any]:
        """Return options of the trainer that add a callback.

        Args:
            callback: Its class.
            arguments: Arguments of its constructor.
        """
        added = {"class_path": class_path(callback), "init_args": arguments}
        return {"callbacks": [*self.trainer_options.get("callbacks", []), added]}

    # -- runs --------------------------------------------------------------------------------------

    def build(self, verb: str = "fit") -> LightningModule:
        """Return a new method, as the command line builds it.

        Raises:
            AssertionError: If the command line cannot build it.
        """
        verb = verb if verb != "fit" or not self._is_zero_shot else "test"
        words = [verb, "--config", str(self.write(self.configuration()))]
        words += ["--output.folder", str(self.folder / "nowhere")]
        with self.isolated():
            quieten()
            try:
                with _captured(), user_errors(known_options):
                    return DryRunCLI(args=arrange(words)).model
            except UserError as error:
                raise AssertionError(f"the command line cannot build the method: {error}") from None

    @property
    def _is_zero_shot(self) -> bool:
        return getattr(self.kind, "can_be_fitted", True) is False

    def run(self, verb: str, *more: str, **trainer: Any) -> Finished:
        """Run a verb in this process, without its page.

        Args:
            verb: The verb.
            more: Further options.
            trainer: Options that override those of the trainer.
        """
        words, folder = self.words(verb, "--output.page", "false", *more, **trainer)
        return self.command(words)._replace(folder=folder)

    def command(self, words: Sequence[str]) -> Finished:
        """Run a command line in this process.

        Args:
            words: Arguments after ``anomaly_clip``.
        """
        with self.isolated(), _captured() as (stdout, stderr):
            code = main(words)
        return Finished(code, stdout.getvalue(), stderr.getvalue(), self.folder)

    def print_config(self, content: Mapping[str, Any], *more: str) -> dict[str, Any]:
        """Return the complete configuration that ``--print_config`` writes.

        Args:
            content: A configuration.
            more: Further options.

        Raises:
            AssertionError: If the exit code is not 0.
        """
        verb = "fit" if self.can_be_fitted else "test"
        words = [verb, "--config", str(self.write(content)), *more, "--print_config"]
        finished = self.command(words)
        assert finished.code == 0, finished.last_line
        printed: dict[str, Any] = yaml.safe_load(finished.stdout)
        return printed

    @shared
    def printed(self) -> dict[str, Any]:
        """The complete configuration of all runs, see :meth:`print_config`; not to be changed."""
        return self.print_config(self.configuration())

    def succeed(self, verb: str, *more: str, **trainer: Any) -> Path:
        """Run a verb, see :meth:`run`, and return its folder.

        Raises:
            AssertionError: If the exit code is not 0.
        """
        finished = self.run(verb, *more, **trainer)
        assert finished.code == 0, f"{verb} ends with {finished.code}: {finished.last_line}"
        return finished.folder

    @shared
    def fitted(self) -> Path:
        """Folder of a fit.

        Raises:
            AssertionError: If the fit fails.
        """
        return self.succeed("fit")

    @shared
    def checkpoint(self) -> Path:
        """Checkpoint of the fit.

        Raises:
            AssertionError: If there is none.
        """
        file = self.fitted / "checkpoints" / "last.ckpt"
        assert file.is_file(), f"fit has written no {file.relative_to(self.fitted)}"
        return file

    @shared
    def tested(self) -> Path:
        """Folder of a test."""
        return self.succeed("test")

    @shared
    def scorer(self) -> Scorer:
        """The method after a test, and test images."""
        return self.load()

    def load(self, **trainer: Any) -> Scorer:
        """Run a test of few images as the command line does, and return the method.

        Args:
            trainer: Options that override those of the trainer.
        """
        words, _ = self.words("test", "--output.page", "false", **trainer)
        with self.isolated(), _captured():
            quieten()
            run = ExperimentCLI(args=arrange(words))
            method, data = run.model, run.datamodule
            assert isinstance(method, AnomalyMethod)
            loaders = data.test_dataloader()
            # Methods that test several times have a loader for each pass.
            batches = list(loaders[0] if isinstance(loaders, list) else loaders)
        images = torch.cat([batch["image"] for batch in batches])
        labels = torch.cat([batch["label"] for batch in batches])
        categories = [name for batch in batches for name in batch["category"]]
        paths = [path for batch in batches for path in batch["path"]]
        # Half of the images are normal and half defective, of all categories.
        order = torch.argsort(labels.int(), stable=True).tolist()
        chosen = order[:: max(1, len(order) // MOST_IMAGES)][:MOST_IMAGES]
        return Scorer(
            method.eval(),
            images[chosen],
            [categories[row] for row in chosen],
            [paths[row] for row in chosen],
        )

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of all runs: an own cache folder, and no network for W&B."""
        return {CACHE_VARIABLE: str(self.folder / "cache"), "WANDB_MODE": "offline"}

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        """Keep random states and environment of the caller; use an own cache folder."""
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        environment = dict(os.environ)
        os.environ.update(self.variables)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])


def flat(scores: Scores) -> Flat:
    """Return the tensors of scores by name; those of ``stage_maps`` with their own names."""
    named: dict[str, Any] = dict(scores)
    steps = named.pop("stage_maps", None) or {}
    return {**named, **{f"stage_maps.{name}": value for name, value in steps.items()}}


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Capture what Python writes to standard output and standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield stdout, stderr


def class_path(kind: type) -> str:
    """Return the name under which the command line imports a class.

    Raises:
        ValueError: If the class is not at the top level of a module.
    """
    if kind.__qualname__ != kind.__name__:
        raise ValueError(
            f"{kind.__qualname__} cannot be named by --model: define it at the top level of a "
            f"module that can be imported"
        )
    return f"{kind.__module__}.{kind.__name__}"


def plain(value: Any) -> Any:
    """Return a value as YAML holds it: dataclasses as mappings, tuples as lists, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def recorded_arguments(method: LightningModule) -> dict[str, Any]:
    """Return the recorded hyper-parameters without the entries that the command line adds."""
    return {name: value for name, value in method.hparams.items() if not name.startswith("_")}


def parameters(kind: type) -> list[str]:
    """Return the names of a constructor's arguments."""
    return [name for name in inspect.signature(kind).parameters if name != "self"]
