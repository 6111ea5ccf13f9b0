"""Checks of what a method declares, and of its settings on the command line and in YAML."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.testing.run_files import leaves
from anomaly_clip.testing.subject import Subject, parameters, plain, recorded_arguments

__all__ = [
    "arguments_are_documented",
    "hyper_parameters_are_plain",
    "hyper_parameters_are_recorded",
    "needs_are_declared",
    "rebuilt_from_its_hyper_parameters",
    "same_seed_same_initial_weights",
    "settings_survive_the_command_line",
    "settings_survive_yaml",
    "unknown_settings_are_refused",
]


def needs_are_declared(subject: Subject) -> None:
    """The method declares whether it is fitted, its image size, and the record of its weights."""
    needs, method = subject.needs, subject.built
    size = needs.image_size
    assert size is None or (isinstance(size, int) and size > 0), f"image_size is {size!r}"
    assert needs.test_passes >= 1, f"test_passes is {needs.test_passes}"
    if not isinstance(method, EvaluatedModule):
        return
    for name in ("must_be_fitted", "can_be_fitted", "is_detector"):
        value = getattr(method, name)
        assert isinstance(value, bool), f"{name} is {value!r}, not True or False"
    assert method.can_be_fitted or not method.must_be_fitted, "must be fitted, but cannot be"
    missing = {"backbone", "pretrained", "random", "sha256"} - set(method.weights)
    assert not missing, f"the record of the weights lacks {', '.join(sorted(missing))}"
    unknown = (method.inference_arguments | method.init_only_arguments) - set(
        parameters(subject.kind)
    )
    assert not unknown - {"evaluator"}, f"there is no argument {', '.join(sorted(unknown))}"


def arguments_are_documented(subject: Subject) -> None:
    """Each argument of the constructor has an entry in the class's docstring, shown by --help."""
    text = inspect.getdoc(subject.kind) or ""
    entries = set(re.findall(r"^\s+(\w+)(?: \([^)]*\))?:", text, re.MULTILINE))
    missing = [name for name in parameters(subject.kind) if name not in entries]
    assert not missing, f"the docstring of {subject.kind.__name__} lacks {', '.join(missing)}"


def hyper_parameters_are_recorded(subject: Subject) -> None:
    """All arguments that affect weights or scores are recorded for checkpoints."""
    method = subject.built
    free = method.inference_arguments if isinstance(method, EvaluatedModule) else frozenset()
    missing = [name for name in parameters(subject.kind) if name not in {*method.hparams, *free}]
    assert not missing, f"save_hyperparameters does not record {', '.join(missing)}"


def hyper_parameters_are_plain(subject: Subject) -> None:
    """Recorded hyper-parameters are plain values, so that checkpoints load without running code."""
    for path, value in leaves(recorded_arguments(subject.built), "hparams"):
        is_plain = value is None or isinstance(value, (bool, int, float, str))
        assert is_plain, f"{path} is a {type(value).__name__}: record plain values"
        assert not isinstance(value, float) or math.isfinite(value), f"{path} is {value}"


def rebuilt_from_its_hyper_parameters(subject: Subject) -> None:
    """The constructor takes the recorded hyper-parameters, as load_from_checkpoint gives them."""
    recorded = plain(recorded_arguments(subject.built))
    with subject.isolated():
        again = subject.kind(**json.loads(json.dumps(recorded)))
    before, after = (plain(recorded_arguments(method)) for method in (subject.built, again))
    differing = [name for name in before if before[name] != after.get(name)]
    assert not differing, f"{differing[0]} was {before[differing[0]]!r} and is rebuilt otherwise"


def settings_survive_the_command_line(subject: Subject) -> None:
    """All settings of a complete configuration, typed as options, give the same settings."""
    printed = subject.printed
    content = subject.configuration()
    content["model"]["init_args"] = {}
    typed = [f"--model.{k}={_typed(v)}" for k, v in _options(printed["model"]["init_args"])]
    again = subject.print_config(content, *typed)["model"]["init_args"]
    for name, value in printed["model"]["init_args"].items():
        assert again[name] == value, f"model.{name} {value!r} is read as {again[name]!r}"


def settings_survive_yaml(subject: Subject) -> None:
    """The complete configuration that a run saves gives the same settings again."""
    printed = subject.printed
    assert subject.print_config(printed) == printed, "a printed configuration is read differently"
    arguments = printed["model"]["init_args"]
    for name, value in subject.arguments.items():
        kept = arguments.get(name)
        same = _contains(kept, value)
        assert same, f"model.{name} {value!r} becomes {kept!r}"


def unknown_settings_are_refused(subject: Subject) -> None:
    """An argument that does not exist ends the command with exit code 2 and one line naming it."""
    verb = "fit" if subject.can_be_fitted else "test"
    finished = subject.run(verb, "--model.no_such_argument", "1")
    assert finished.code == 2, f"exit code {finished.code} for --model.no_such_argument"
    assert "no_such_argument" in finished.last_line, finished.last_line
    assert "Traceback" not in finished.stderr, finished.stderr


def same_seed_same_initial_weights(subject: Subject) -> None:
    """Built twice with the same seed, the method starts from the same weights."""
    first, second = (method.state_dict() for method in (subject.built, subject.build()))
    assert list(first) == list(second), "the names of the tensors differ"
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"{len(differing)} tensors differ, such as {differing[0]}"


def _options(arguments: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options as they are typed: one for each value of nested settings."""
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            yield from _options(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _contains(kept: Any, given: Any) -> bool:
    """Return whether kept settings hold the given ones; others may have defaults."""
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        return all(_contains(kept.get(key), value) for key, value in given.items())
    return bool(kept == given)
