"""Reader of W&B sweep files, and the options of each run.

The same file serves W&B's agents and ``anomaly_clip sweep``, so its syntax is W&B's
(https://docs.wandb.ai/models/sweeps/sweep-config-keys). Values that W&B accepts, but that this
command line would interpret differently, are rejected.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.sweep_parameter import Parameter, read_parameter
from anomaly_clip.commands.yaml_text import read_yaml_text
from anomaly_clip.documents import DocumentError, load_yaml
from anomaly_clip.errors import UserError, suggest

__all__ = ["METHODS", "Sweep", "read_sweep"]

FILE_KEYS = (
    *("program", "entity", "project", "description", "name", "method", "metric", "parameters"),
    *("early_terminate", "command", "run_cap"),
)
METHODS = ("grid", "random", "bayes")
ARGS = "${args}"
COMMAND_STARTS = ("${env}", "${interpreter}", "python", "python3", "-m")
"""Words that a command may begin with; they are dropped here."""
MAX_RUNS = 1000  # our choice; applies to a grid if neither --count nor run_cap is set


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file.

    Args:
        file: Path of the file.
        text: Unparsed content.
        method: grid, random or bayes.
        metric: Name of the metric to optimise, as ``fit`` logs it.
        maximize: Whether higher is better.
        parameters: Distributions of the swept options, by option name.
        before: Arguments of ``anomaly_clip fit`` before the swept options.
        after: Arguments after the swept options.
        run_cap: Maximum number of runs.
        ignored: Keys that only W&B's server uses.
    """

    file: Path
    text: str
    method: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Parameter]
    before: tuple[str, ...]
    after: tuple[str, ...]
    run_cap: int | None
    ignored: tuple[str, ...]

    def runs(self, method: str, count: int | None, seed: int) -> list[dict[str, Any]]:
        """Return the options of each run.

        Args:
            method: ``grid`` (all combinations; the last parameter changes fastest) or ``random``.
            count: Maximum number of runs; ``run_cap`` applies as well.
            seed: Seed of ``random``.

        Raises:
            UserError: If the file cannot be run with this method.
        """
        bounds = [bound for bound in (count, self.run_cap) if bound is not None]
        most = min(bounds, default=None)
        if method == "random":
            if most is None:
                raise UserError(
                    f"{self.file}: method random has no end: limit the number of runs with "
                    f"--count N, or with run_cap in the file"
                )
            return [
                {name: p.draw(seed, run, name) for name, p in self.parameters.items()}
                for run in range(1, most + 1)
            ]
        for name, parameter in self.parameters.items():
            if parameter.settings is not None:
                raise UserError(
                    f"{self.file}: parameters.{name} is {parameter.distribution}, but a grid needs "
                    f"values: list the values, or sample with --method random --count N"
                )
        columns = [parameter.values for parameter in self.parameters.values()]
        total = math.prod(map(len, columns))
        if most is None and total > MAX_RUNS:
            raise UserError(
                f"{self.file}: the grid has {total:,} runs, more than {MAX_RUNS:,}: run the first "
                f"N with --count N, or sample N with --method random --count N"
            )
        rows = itertools.islice(itertools.product(*columns), most)
        return [dict(zip(self.parameters, row, strict=True)) for row in rows]

    def words(self, options: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
        """Return the arguments of ``anomaly_clip fit``, with options as in W&B's ``${args}``.

        Args:
            options: Options of a run.
            more: The user's own arguments, which precede the options of the run.
        """
        swept = [f"--{name}={value}" for name, value in options.items()]
        return [*self.before, *more, *swept, *self.after]


def read_sweep(file: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: If the file cannot be read or is not a valid sweep file.
    """
    text = read_yaml_text(file, str(file))
    try:
        content = load_yaml(text)  # as W&B reads it
    except DocumentError as error:
        raise UserError(f"{file}: {error}: correct the file") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise UserError(f"{file}: not valid YAML{line}: correct the file") from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"{file}: expected a sweep file with keys (see configs/sweeps/demo.yaml), got "
            f"{type(content).__name__}"
        )
    try:
        before, after = _command(content)
        metric, maximize = _metric(content)
        return Sweep(
            file=file,
            text=text,
            method=_method(content),
            metric=metric,
            maximize=maximize,
            parameters=_parameters(content),
            before=before,
            after=after,
            run_cap=_run_cap(content),
            ignored=tuple(_ignored(content)),
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _command(content: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments of ``fit`` before and after the options of a run."""
    for key in content:
        if key not in FILE_KEYS:
            raise ValueError(f"{key} is not a key of a sweep file: {suggest(str(key), FILE_KEYS)}")
    program = str(content.get("program", ""))
    if Path(program).name != "anomaly_clip":
        given = program or "missing"
        raise ValueError(f"program is {given}: set program: anomaly_clip")
    command = content.get("command")
    example = f"such as [${{env}}, anomaly_clip, fit, --config, FILE, {ARGS}]"
    if not isinstance(command, list) or not command:
        raise ValueError(f"command: expected a list of words, {example}, got {command}")
    words = [_with_environment(str(word)) for word in command]
    words = [program if word == "${program}" else word for word in words]
    start = next((n for n, word in enumerate(words) if word not in COMMAND_STARTS), len(words))
    program_words = words[start : start + 2]
    if [Path(word).name for word in program_words] != ["anomaly_clip", "fit"]:
        runs = " ".join(program_words) or "nothing"
        raise ValueError(f"command runs {runs}: expected anomaly_clip fit, {example}")
    words = words[start + 2 :]
    for word in words:
        if "${" in word and word != ARGS:
            raise ValueError(f"command: anomaly_clip does not support {word}: write {ARGS}")
    if words.count(ARGS) != 1:
        raise ValueError(
            f"command: expected {ARGS} once, where the options of a run belong, {example}; it "
            f"occurs {words.count(ARGS)} times"
        )
    at = words.index(ARGS)
    before, after = words[:at], words[at + 1 :]
    if any(word.partition("=")[0] in ("--config", "-c") for word in after):
        raise ValueError(
            f"command: --config comes after {ARGS}: put --config before {ARGS}, {example}"
        )
    return tuple(before), tuple(after)


def _with_environment(word: str) -> str:
    """Replace ``${envvar:NAME}`` by the value of an environment variable."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(
                f"command: {match[0]}: the environment variable {match[1]} is not set: set it"
            )
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", value, word)


def _method(content: Mapping[str, Any]) -> str:
    method = content.get("method")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method}")
    return str(method)


def _metric(content: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the name of the metric to optimise, and whether to maximise it."""
    metric = content.get("metric")
    example = "such as {name: val/pixel_ap, goal: maximize}"
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        raise ValueError(
            f"metric: expected the metric that runs are compared by, {example}, got {metric}"
        )
    name, goal = metric["name"], metric.get("goal")
    if goal not in ("maximize", "minimize"):  # W&B would minimise if there is no goal
        raise ValueError(f"metric.goal: expected maximize or minimize, got {goal}")
    if not name.startswith(("val/", "train/")):
        raise ValueError(
            f"metric.name {name} is never logged by fit: choose a validation metric, {example}"
        )
    return name, goal == "maximize"


def _run_cap(content: Mapping[str, Any]) -> int | None:
    cap = content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise ValueError(f"run_cap: expected a number of runs, 1 or more, got {cap}")
    return cap


def _ignored(content: Mapping[str, Any]) -> Iterator[str]:
    if content.get("early_terminate") is not None:
        yield "early_terminate"
    if content["metric"].get("target") is not None:
        yield "metric.target"


def _parameters(content: Mapping[str, Any]) -> dict[str, Parameter]:
    parameters = content.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        raise ValueError(
            "parameters: expected options, such as model.lr: {values: [1.0e-4, 1.0e-3]}, got "
            f"{parameters}"
        )
    return {str(name): read_parameter(str(name), value) for name, value in parameters.items()}
