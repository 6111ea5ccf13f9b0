"""User errors, explained in one line: where, what was expected, what was given, the way out."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from anomaly_clip.exhaustion import explain_exhaustion

__all__ = [
    "FULL",
    "Diverged",
    "UserError",
    "check_above",
    "check_at_least",
    "check_between",
    "check_choice",
    "explain",
    "is_of_users_code",
    "reaches_users_code",
    "reason",
    "shortened",
    "suggest",
    "user_errors",
]


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit on the size of files that is full."""
CONSTRUCTORS = ("__init__", "__post_init__")
INSTALLED = frozenset(("site-packages", "dist-packages"))
"""Names of the folders that pip and Linux distributions install libraries into."""
MAX_MESSAGE = 600
"""Characters of the longest message that is printed; a value in it may be of any length."""


class UserError(Exception):
    """A mistake that the user can correct, explained in one line."""


class Diverged(ValueError):
    """Values of a fit, such as its loss or weights, are NaN or infinite."""


@contextmanager
def user_errors(options: Callable[[], Iterable[str]] = list) -> Iterator[None]:
    """Convert exceptions caused by a user's mistake to :class:`UserError`.

    Args:
        options: Returns the options of the command line, for suggestions.
    """
    # These imports take seconds, and the value checks below do not need them.
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    mistakes = (
        ArgumentError,
        ValueError,
        OSError,
        MisconfigurationException,
        ModuleNotFoundError,  # an optional package that an option requires
    )
    try:
        yield
    except UserError:
        raise
    except Exception as caught:
        error = _of_constructor(caught)
        explanation = explain_exhaustion(error)
        trace = error.__traceback__
        if error is caught:  # without the frames of this function and of the block
            trace = trace and trace.tb_next and trace.tb_next.tb_next
        is_mistake = isinstance(error, mistakes) and not is_of_users_code(error, trace)
        if explanation is None and not is_mistake:
            if error is caught:
                raise
            raise error from None
        raise UserError(explanation or explain(error, options())) from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a value is one of the choices, for callers that do not use the command line.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Check that a number is not below a bound and not NaN.

    Args:
        name: The option as a user types it, such as ``model.sigma``.
        value: Its value.
        least: Lowest allowed value.

    Raises:
        ValueError: If the value is lower or NaN.

    Example:
        >>> from anomaly_clip.errors import check_at_least
        >>> check_at_least("model.sigma", -1, 0)
        Traceback (most recent call last):
        ValueError: model.sigma must be 0 or more, got -1
    """
    if not value >= least:
        raise ValueError(f"{name} must be {least} or more, got {value}")


def check_above(name: str, value: float, bound: float) -> None:
    """Check that a number is above a bound; see :func:`check_at_least`.

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
    """Check that a number lies in an interval; see :func:`check_at_least`.

    Args:
        name: The option as a user types it.
        value: Its value.
        low: Lower end.
        high: Upper end.
        open_low: Whether to exclude the lower end.
        open_high: Whether to exclude the upper end.

    Raises:
        ValueError: If the value is outside.
    """
    inside = low <= value <= high and not (open_low and value == low)
    if not inside or (open_high and value == high):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value}")


def reaches_users_code(trace: TracebackType | None) -> bool:
    """Return whether a traceback leads through files outside this package and installed ones."""
    return any(_is_users_file(frame.filename) for frame in traceback.extract_tb(trace))


def is_of_users_code(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether an exception comes from code outside this package and installed ones.

    Its traceback is what the author of that code needs. Messages of this package that such code has
    caused, a full disk, and a ``raise`` in a constructor, which checks options, are no such errors.

    Args:
        error: The exception.
        trace: The part of its traceback that is searched.
    """
    if _raised_here(error) is not None or _is_full(error):
        return False
    in_worker = re.findall(r'^ *File "(.+?)", line', str(error), re.MULTILINE)
    if "Original Traceback" in str(error):  # raised in a data loader worker
        return any(_is_users_file(file) for file in in_worker)
    if not reaches_users_code(trace):
        return False
    last = traceback.extract_tb(trace)[-1]
    is_check = last.name in CONSTRUCTORS and (last.line or "").startswith("raise ")
    return not (is_check and _is_users_file(last.filename))


def shortened(message: str, longest: int = MAX_MESSAGE) -> str:
    """Cut the middle out of a long message: it begins with the place, and ends with the way out.

    Args:
        message: The message.
        longest: Largest number of characters.
    """
    if len(message) <= longest:
        return message
    end = longest // 3
    start = longest - end - 5
    return f"{message[:start].rstrip()} ... {message[-end:].lstrip()}"


def explain(error: BaseException, options: Iterable[str] = ()) -> str:
    """Explain a user's mistake on one line.

    Args:
        error: The exception.
        options: The options of the command line, for suggestions.
    """
    package_error = _raised_here(error)
    names_file = isinstance(package_error, OSError) and package_error.filename is not None
    if package_error is not None and not names_file:
        return _one_line(str(package_error))
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            file = "" if cause.filename is None else f"{cause.filename}: "
            return f"{file}{cause.strerror}: free space there, or choose another folder"
    if package_error is not None:
        return _one_line(str(package_error))
    from jsonargparse import ArgumentError

    message = str(error)
    if "Original Traceback" in message:  # raised in a data loader worker
        last = message.strip().splitlines()[-1]
        return last.partition(": ")[2] or last
    if isinstance(error, ArgumentError):
        return _explain_parsing(message, list(options))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = Path(str(error.filename)).name
        return (
            f"{name[:60]} ...: a name of {len(name)} characters is too long for a disk: shorten it"
        )
    if "embedded null" in message:  # as Python calls it
        return "a name or path contains a null character (\\0), which no disk takes: remove it"
    if apart := _arguments_apart(message):
        return apart
    return _one_line(message) or type(error).__name__


def reason(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return re.split(r"(?<=[a-z])\. ", lines[0])[0] if lines else type(error).__name__


def suggest(word: str, choices: Iterable[str]) -> str:
    """Suggest the most similar choices, or list all of them if there are few."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(choices)}" if 0 < len(choices) <= 20 else ""


def _is_users_file(file: str) -> bool:
    """Return whether a file is neither of this package, nor of Python, nor installed anywhere.

    Libraries may lie outside this environment's folders, as after ``pip install --user``.
    """
    path, paths = Path(file), sysconfig.get_paths()
    if file.startswith("<") or not INSTALLED.isdisjoint(path.parts):
        return False
    ours = [Path(__file__).parent, *(Path(paths[n]) for n in ("stdlib", "purelib", "platlib"))]
    return not any(path.is_relative_to(folder) for folder in ours)


def _is_full(error: BaseException) -> bool:
    return any(isinstance(cause, OSError) and cause.errno in FULL for cause in _chain(error))


def _raised_here(error: BaseException) -> BaseException | None:
    """Return the earliest exception in the chain of causes that this package raised itself."""
    package = Path(__file__).parent
    package_error = None
    for seen in _chain(error):
        trace = seen.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(package):
            package_error = seen
    return package_error


def _of_constructor(error: Exception) -> Exception:
    """Return the exception of a user's own class that the parser has wrapped, or the error."""
    inner: BaseException | None = error
    while inner is not None and str(inner).startswith("Does not validate"):
        inner = inner.__cause__
    if not isinstance(inner, Exception) or inner is error:
        return error
    return inner if reaches_users_code(inner.__traceback__) else error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its cause, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        context = None if seen.__suppress_context__ else seen.__context__  # "from None"
        seen = seen.__cause__ or context


def _explain_parsing(message: str, options: list[str]) -> str:
    """Rephrase a parser's message: first the key, then what was expected and given."""
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        word = match[1]
        if not word.startswith("-"):
            hint = ", and a pattern of files needs quotes" if Path(word).exists() else ""
            return f"unexpected argument {word}: options begin with --{hint}"
        return _join(f"unknown option {word.partition('=')[0]}", suggest(word, options))
    if match := re.match(r"Subcommand '\w+' does not accept option '([\w.]+)'", message):
        hint = suggest(f"--{match[1]}", options).replace("--", "")
        return _join(f"{match[1]}: there is no such option", hint)
    if match := re.search(r"following arguments are required: (.+)", message):
        owner, *_ = _read_message(message)
        names = [key.partition(".")[2] or key for key in match[1].split(", ")]
        keys = ", ".join(f"--{_path(owner, name)}" for name in names)
        return f"{keys} missing: add it, or give --config of an experiment (such as --config sdp)"
    if match := re.search(r'key "config": (.+?): \'(.+)\'', message):
        return f"--config {match[2]}: {match[1][0].lower()}{match[1][1:]}"
    if message.startswith(
        ("Unexpected config", "Problems parsing config", "Unable to parse config")
    ):
        return f"--config: not a valid YAML configuration ({_one_line(message)[:200]})"
    key, owner, reasons = _read_message(message)
    if apart := _options_apart(message):
        return f"{key}: {apart} do not go together: leave one out, or list the options with --help"
    for reason in reasons:
        if kind := _other_kind(key, reason, message):
            return kind
        if match := re.match(r"Option '(.+)' is not accepted", reason):
            name = owner.rpartition(".")[2]
            return _join(
                f"{_path(key, match[1])}: {name or 'this verb'} has no such option",
                # The class may refuse an option of its parents, such as Demo the root.
                "leave it out, or list the options with --help"
                if match[1] in _options(owner)
                else suggest(match[1], _options(owner)) or "list the options with --help",
            )
        if match := re.match(r"Expected a dot import path string: (.+)", reason):
            return _join(f"{key}: there is no class {match[1]}", suggest(match[1], _classes(key)))
        if match := re.match(r"(?:Key '|unrecognized arguments: --)([\w.]+)", reason):
            return f"{_path(key, match[1])}: there is no such option"
        if "is abstract" in reason:
            named = re.search(r"(?:class_path': '|Given value: )(\w+(?:\.\w+)+)", message)
            if named and (lacking := _abstract_names(named[1])):
                return f"{key}: {named[1]} does not implement {lacking}: add it to the class"
            return f"{key}: no class is selected: give --config or --{key} NAME before its options"
        match = re.match(r"No module named '(\w+)'", reason)
        if match and Path(f"{match[1]}.py").is_file():
            return (
                f"{key}: {match[1]}.py in this folder is imported only for a name on the command "
                f"line or in a file named by --config: name it there, or set PYTHONPATH=."
            )
    expected = [
        match[1] for r in reasons if (match := re.match(r"Expected an? (.+?)(\. Got|$)", r))
    ]
    values = re.findall(r"(?:Got value|Given value): (.+)", message)
    if expected and values:
        kinds = " or ".join(dict.fromkeys(_kind(kind) for kind in expected))
        given = re.sub(r"^NestedArg\(key='.*', val='(.*)'\)$", r"\1", values[0])
        given = {"None": "null", "True": "true", "False": "false"}.get(given, given)
        return _join(f"{key}: expected {kinds}, got {given}", _hint(expected, given))
    return _join(key, "; ".join(reasons) or _one_line(message))


def _other_kind(key: str, reason: str, message: str) -> str:
    """Return a message about an option of another kind of backbone; empty for other options."""
    match = re.match(r"(?:Option '|Key '|unrecognized arguments: --)([\w.]+)", reason)
    option = _path(key, match[1]) if match else ""
    takes_all = "towers.BackboneSettings" in message and "clip.CLIPSettings" in message
    kinds = ("CLIP models", "CNNs of torchvision"), ("CNNs and ViTs", "CLIP models")
    for word, other, (kind, taken) in zip(
        ("pretrained", "weights"), ("weights", "pretrained"), kinds, strict=True
    ):
        if option.endswith(f"backbone.{word}"):
            if takes_all:
                return (
                    f"{option} is an option of {kind}, but another kind of backbone is chosen "
                    f"before it: give {option.removesuffix(word)}name and {option} as two options"
                )
            return (
                f"{option} is an option of {kind}, but this method only takes {taken}: give "
                f"{option.removesuffix(word)}{other}, or choose another method (docs/towers.md)"
            )
    return ""


def _options_apart(message: str) -> str:
    """Return options of which each belongs to another class that could be meant; empty if none."""
    refused = re.findall(r"class_path '(.+)':\s+Option '(.+)' is not accepted", message)
    names = list(dict.fromkeys(name for _, name in refused))
    accepted = {option for owner, _ in refused for option in _options(owner)}
    return " and ".join(names) if len(names) > 1 and accepted.issuperset(names) else ""


def _arguments_apart(message: str) -> str:
    """Explain that no class takes all given arguments, when an object is built; else empty."""
    refused = re.findall(r"__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    names = sorted(set(refused))
    values = re.findall(r"Given value: (.+)", message)
    if len(names) < 2 or not values:
        return ""
    match = re.search(rf"(\w+)={re.escape(values[0])}", values[-1])
    owner = "model." if "LightningModule" in message else ""
    key = f"{owner}{match[1]}: " if match else ""
    together = " and ".join(names)
    return f"{key}{together} do not go together: leave one out, or list the options with --help"


def _read_message(message: str) -> tuple[str, str, list[str]]:
    """Return the key, its class and the reasons in a nested message."""
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
    """Return a readable name for the Python spelling of a type."""
    if match := re.match(r"typing\.Literal\[(.+)\]", text):
        return f"one of {match[1]}"
    return re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", text)


def _hint(expected: Sequence[str], given: str) -> str:
    """Return how to write a value that was read as another type than the expected one."""
    kinds = {_kind(kind) for kind in expected}
    if kinds <= {"list", "Sequence"} and not given.startswith(("[", "{")):
        if not re.search("[a-z]", given, re.IGNORECASE):  # 1 may have been typed as 01
            return "write it as a list in brackets, such as '[01, 02]'"
        text = given if re.fullmatch(r"[\w.-]+", given) else f'"{given}"'
        return f"write it as a list, such as '[{text}]'"
    if "str" in kinds:  # such as 01, which YAML reads as a number
        return 'put text in quotes, such as "01" or "part: left"'
    return ""


def _abstract_names(class_path: str) -> str:
    """Return what a user's own class lacks; empty for the base classes of this package."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if kind is None or module.startswith(f"{__package__}."):
        return ""
    return ", ".join(sorted(kind.__abstractmethods__))


def _options(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: list[str] = []
    for parent in inspect.getmro(target):  # up to the first class without **kwargs
        parameters = inspect.signature(vars(parent).get("__init__", parent)).parameters
        plain = (p for p in parameters.values() if p.kind is not p.VAR_KEYWORD)
        names += [p.name for p in plain if p.name != "self" and p.name not in names]
        if len(names) and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _classes(key: str) -> list[str]:
    """Return the short class names that ``--model`` or ``--data`` accept."""
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
