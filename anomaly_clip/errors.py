"""Exceptions of a user's mistakes, explained in one sentence: what, where, the way out."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "UserError",
    "check_above",
    "check_at_least",
    "check_between",
    "check_choice",
    "explain",
    "reason",
    "suggest",
    "user_errors",
]


class UserError(Exception):
    """A mistake that the user can mend, explained in one sentence."""


@contextmanager
def user_errors(options: Callable[[], Iterable[str]] = list) -> Iterator[None]:
    """Turn what a user's mistake raises into a :class:`UserError`.

    Args:
        options: Returns the options that the command line knows, for suggestions.
    """
    # Both take seconds to import, which who only checks values need not wait for.
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (
        ArgumentError,
        ValueError,
        OSError,
        MisconfigurationException,
        ModuleNotFoundError,  # an optional package that an option asks for
    ) as error:
        raise UserError(explain(error, options())) from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of those known; the command line does so itself.

    Raises:
        ValueError: If it is none.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below a bound, and NaN.

    Args:
        name: The option as a user types it, such as ``model.sigma``.
        value: Its value.
        least: The lowest value allowed.

    Raises:
        ValueError: If the value is lower.

    Example:
        >>> from anomaly_clip.errors import check_at_least
        >>> check_at_least("model.sigma", -1, 0)
        Traceback (most recent call last):
        ValueError: model.sigma must be 0 or more, got -1
    """
    if not value >= least:
        raise ValueError(f"{name} must be {least} or more, got {value}")


def check_above(name: str, value: float, bound: float) -> None:
    """Refuse a number that is not above a bound; see :func:`check_at_least`.

    Raises:
        ValueError: If it is not.
    """
    if not value > bound:
        raise ValueError(f"{name} must be above {bound}, got {value}")


def check_between(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse a number outside of an interval; see :func:`check_at_least`.

    Args:
        name: The option as a user types it.
        value: Its value.
        low: Lower end.
        high: Upper end.
        open_low: Whether the lower end itself is refused.
        open_high: Whether the upper end itself is refused.

    Raises:
        ValueError: If the value is outside.
    """
    inside = low <= value <= high and not (open_low and value == low)
    if not inside or (open_high and value == high):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value}")


def explain(error: BaseException, options: Iterable[str] = ()) -> str:
    """Return one sentence on a user's mistake.

    Args:
        error: The exception.
        options: The options that the command line knows, for suggestions.
    """
    own_error = _raised_here(error)
    if own_error is not None:
        return _one_line(str(own_error))
    from jsonargparse import ArgumentError

    message = str(error)
    if "Original Traceback" in message:  # raised in a process that loads data
        last = message.strip().splitlines()[-1]
        return last.partition(": ")[2] or last
    if isinstance(error, ArgumentError):
        return _explain_parsing(message, list(options))
    return _one_line(message) or type(error).__name__


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return a hint at the nearest choices, or all of them if there are few."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(choices)}" if 0 < len(choices) <= 20 else ""


def _raised_here(error: BaseException) -> BaseException | None:
    """Return the first cause that this package raised itself."""
    package = str(Path(__file__).parent)
    own_error, seen = None, error
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_code.co_filename.startswith(package):
            own_error = seen
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    return own_error


def _explain_parsing(message: str, options: list[str]) -> str:
    """Translate a parser's message: the key first, then the value expected there."""
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        word = match[1]
        if not word.startswith("-"):
            return f"{word}: unexpected word; options begin with --"
        return _join(f"unknown option {word.partition('=')[0]}", suggest(word, options))
    if match := re.match(r"Subcommand '\w+' does not accept option '([\w.]+)'", message):
        hint = suggest(f"--{match[1]}", options).replace("--", "")
        return _join(f"{match[1]}: there is no such option", hint)
    if match := re.search(r"following arguments are required: (.+)", message):
        owner, *_ = _read_message(message)
        names = [key.partition(".")[2] or key for key in match[1].split(", ")]
        keys = ", ".join(f"--{_path(owner, name)}" for name in names)
        return f"{keys} missing: name it, or give an experiment's --config (as configs/sdp.yaml)"
    if match := re.search(r'key "config": (.+?): \'(.+)\'', message):
        return f"--config {match[2]}: {match[1][0].lower()}{match[1][1:]}"
    if message.startswith(
        ("Unexpected config", "Problems parsing config", "Unable to parse config")
    ):
        return f"--config: a file is not a configuration in YAML ({_one_line(message)[:200]})"
    key, owner, reasons = _read_message(message)
    for reason in reasons:
        if match := re.match(r"Option '(.+)' is not accepted", reason):
            name = owner.rpartition(".")[2]
            return _join(
                f"{_path(key, match[1])}: {name} has no such option",
                suggest(match[1], _options(owner)),
            )
        if match := re.match(r"Expected a dot import path string: (.+)", reason):
            return _join(f"{key}: there is no class {match[1]}", suggest(match[1], _classes(key)))
        if match := re.match(r"(?:Key '|unrecognized arguments: --)([\w.]+)", reason):
            return f"{_path(key, match[1])}: there is no such option"
        if "is abstract" in reason:
            return (
                f"{key}: no class is chosen yet: give --config or --{key} NAME before its options"
            )
    expected = [
        match[1] for r in reasons if (match := re.match(r"Expected an? (.+?)(\. Got|$)", r))
    ]
    values = re.findall(r"(?:Got value|Given value): (.+)", message)
    if expected and values:
        kinds = " or ".join(dict.fromkeys(_kind(kind) for kind in expected))
        given = re.sub(r"^NestedArg\(key='.*', val='(.*)'\)$", r"\1", values[0])
        return f"{key}: expected {kinds}, got {given}"
    return _join(key, "; ".join(reasons) or _one_line(message))


def _read_message(message: str) -> tuple[str, str, list[str]]:
    """Return the key, the class it belongs to and the reasons in a nested message."""
    keys: list[str] = []
    owner, reasons = "", []
    for line in map(str.strip, message.splitlines()):
        text = line.removeprefix("- ")
        if match := re.match(r'Parser key "(.+?)":?\s*(.*)', text):
            keys.append(match[1])
            text = match[2]
        if match := re.match(r"Problem with given class_path '(.+)':", text):
            owner = match[1]
            continue
        noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")
        if text and not text.startswith(noise) and "NoneType" not in text:
            reasons.append(text)
    return ".".join(keys), owner, reasons


def _kind(text: str) -> str:
    """Turn a type's spelling in Python into words."""
    if match := re.match(r"typing\.Literal\[(.+)\]", text):
        return f"one of {match[1]}"
    return re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", text)


def _options(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: list[str] = []
    for parent in inspect.getmro(target):  # up to the class that passes nothing on
        parameters = inspect.signature(vars(parent).get("__init__", parent)).parameters
        plain = (p for p in parameters.values() if p.kind is not p.VAR_KEYWORD)
        names += [p.name for p in plain if p.name != "self" and p.name not in names]
        if len(names) and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _classes(key: str) -> list[str]:
    """Return the short names that may stand behind ``--model`` or ``--data``."""
    module = {"model": "anomaly_clip.methods", "data": "anomaly_clip.data"}.get(key)
    return list(_concrete_classes(module)) if module else []


def _concrete_classes(module: str) -> Iterator[str]:
    from lightning.pytorch import LightningDataModule, LightningModule

    for name, value in vars(importlib.import_module(module)).items():
        kinds = (LightningModule, LightningDataModule)
        if inspect.isclass(value) and issubclass(value, kinds) and not inspect.isabstract(value):
            yield name


def _path(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _join(mistake: str, hint: str) -> str:
    return f"{mistake}: {hint}" if mistake and hint else mistake or hint


def _one_line(message: str) -> str:
    return " ".join(message.split())
