"""A sweep file of W&B, and the options of each of its runs.

One file serves W&B's agents and ``anomaly_clip sweep``, so the grammar is W&B's
(https://docs.wandb.ai/models/sweeps/sweep-config-keys). What it allows but this command line would
take for something else is refused.
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
from anomaly_clip.errors import UserError, suggest

__all__ = ["METHODS", "Sweep", "read_sweep"]

FILE_KEYS = (
    *("program", "entity", "project", "description", "name", "method", "metric", "parameters"),
    *("early_terminate", "command", "run_cap"),
)
METHODS = ("grid", "random", "bayes")
ARGS = "${args}"
COMMAND_STARTS = ("${env}", "${interpreter}", "python", "python3", "-m")
"""Words that a command may begin with; here they are left out."""
MAX_RUNS = 1000  # our choice: of a grid that nobody has bounded


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file.

    Args:
        file: Its path.
        text: Its content.
        method: grid, random or bayes.
        metric: The name of the goal, as ``fit`` logs it.
        maximize: Whether more of it is better.
        parameters: The options that differ from run to run.
        before: The words between ``anomaly_clip fit`` and these options.
        after: The words behind them.
        run_cap: Most runs.
        ignored: Keys for W&B alone.
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
            method: grid: all combinations, the last parameter changing fastest; or random.
            count: Most runs; ``run_cap`` bounds them, too.
            seed: Draws those of random.

        Raises:
            UserError: If the file cannot be run so.
        """
        bounds = [bound for bound in (count, self.run_cap) if bound is not None]
        most = min(bounds, default=None)
        if method == "random":
            if most is None:
                raise UserError(
                    f"{self.file}: method random has no end: say how many runs with --count N, or "
                    f"with run_cap in the file"
                )
            return [
                {name: p.draw(seed, run, name) for name, p in self.parameters.items()}
                for run in range(1, most + 1)
            ]
        for name, parameter in self.parameters.items():
            if parameter.settings is not None:
                raise UserError(
                    f"{self.file}: parameters.{name}: a grid has no ranges: list its values, or "
                    f"draw them with --method random --count N"
                )
        columns = [parameter.values for parameter in self.parameters.values()]
        total = math.prod(map(len, columns))
        if most is None and total > MAX_RUNS:
            raise UserError(
                f"{self.file}: the grid has {total:,} runs: take the first of them with --count N, "
                f"or draw some with --method random --count N"
            )
        rows = itertools.islice(itertools.product(*columns), most)
        return [dict(zip(self.parameters, row, strict=True)) for row in rows]

    def words(self, options: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
        """Return the words behind ``anomaly_clip fit``, options as W&B's ``${args}`` writes them.

        Args:
            options: Those of a run.
            more: Words of the user's, before the options of the run.
        """
        swept = [f"--{name}={value}" for name, value in options.items()]
        return [*self.before, *more, *swept, *self.after]


def read_sweep(file: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: What is wrong with it, where, and the way out.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)  # as W&B reads it
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise UserError(f"{file}: not a file in YAML{line}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: expected a sweep file (as configs/sweeps/demo.yaml)")
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
    """Return the words of ``fit`` before and behind the options of a run."""
    for key in content:
        if key not in FILE_KEYS:
            raise ValueError(f"{key} is no key of a sweep file: {suggest(str(key), FILE_KEYS)}")
    program = str(content.get("program", ""))
    if Path(program).name != "anomaly_clip":
        given = program or "missing"
        raise ValueError(
            f"program is {given}: a sweep here runs this project, program anomaly_clip"
        )
    command = content.get("command")
    example = f"as [${{env}}, anomaly_clip, fit, --config, FILE, {ARGS}]"
    if not isinstance(command, list) or not command:
        raise ValueError(f"command: expected the words of a fit, {example}")
    words = [_with_environment(str(word)) for word in command]
    words = [program if word == "${program}" else word for word in words]
    start = next((n for n, word in enumerate(words) if word not in COMMAND_STARTS), len(words))
    program_words = words[start : start + 2]
    if [Path(word).name for word in program_words] != ["anomaly_clip", "fit"]:
        runs = " ".join(program_words) or "nothing"
        raise ValueError(f"command runs {runs}, not anomaly_clip fit")
    words = words[start + 2 :]
    for word in words:
        if "${" in word and word != ARGS:
            raise ValueError(f"command: {word} is not understood by anomaly_clip: write {ARGS}")
    if words.count(ARGS) != 1:
        raise ValueError(f"command: expected {ARGS} once, where the options of a run go, {example}")
    at = words.index(ARGS)
    before, after = words[:at], words[at + 1 :]
    if any(word.partition("=")[0] in ("--config", "-c") for word in after):
        raise ValueError(f"command: --config comes behind {ARGS}: put it in front, {example}")
    return tuple(before), tuple(after)


def _with_environment(word: str) -> str:
    """Put variables of the environment in the place of ``${envvar:NAME}``."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"command: {match[0]}: the environment has no {match[1]}: set it")
        return os.environ[match[1]]

    return re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", value, word)


def _method(content: Mapping[str, Any]) -> str:
    method = content.get("method")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method}")
    return str(method)


def _metric(content: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the name of the goal, and whether it is to be large."""
    metric = content.get("metric")
    example = "as {name: val/pixel_ap, goal: maximize}"
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        raise ValueError(f"metric: expected the figure that runs are compared by, {example}")
    name, goal = metric["name"], metric.get("goal")
    if goal not in ("maximize", "minimize"):  # W&B would minimise
        raise ValueError(f"metric.goal: expected maximize or minimize, got {goal}")
    if not name.startswith(("val/", "train/")):
        raise ValueError(
            f"metric.name {name} is never logged by fit: take a figure of the validation, {example}"
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
            "parameters: expected options, as model.lr: {values: [1.0e-4, 1.0e-3]}, and got none"
        )
    return {str(name): read_parameter(str(name), value) for name, value in parameters.items()}
