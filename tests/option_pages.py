"""Write the pages of docs/options/ from the parsers, signatures and docstrings.

python tests/option_pages.py    renew docs/options/
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import Trainer
from option_texts import NOTE, anchor, cell, first_sentence, links, prose, summary, table
from python_names import python_page

from anomaly_clip import data, methods
from anomaly_clip.cli import VERBS, main
from anomaly_clip.data.info import DATASETS
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.recording.writer import RunWriter

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "options"
METHODS = FOLDER.parent / "methods"
EXPERIMENTS = ("fit", "validate", "test", "predict")
PAGES_OF_METHODS = {
    "APRILGAN": "april_gan",
    "CLIPADA": "clip_ada",
    "LinearProbe": "linear_probe",
    "SDPPlus": "sdp_plus",
}
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
MOST_ITEMS = 4
"""Longest list that is shown whole."""
PLURALS: dict[Any, str] = {int: "integers", float: "numbers", str: "texts", dict: "mappings"}


class Option(NamedTuple):
    """An option of a class."""

    name: str
    annotation: Any
    default: Any
    text: str


def options_of(kind: type, skip: Iterable[str] = ()) -> list[Option]:
    """Return the options of a class, those of its base classes included."""
    return [
        Option(p.name, p.annotation, p.default, p.doc or "")
        for p in get_signature_parameters(kind)
        if p.name not in skip
    ]


# -- types and defaults ----------------------------------------------------------------------------


def settings_in(annotation: Any) -> list[type]:
    """Return the classes of settings that an option may be given as."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in settings_in(part)]


def type_words(annotation: Any, link: str = "") -> str:
    """Return a type in plain words.

    Args:
        annotation: The type.
        link: Page of the tables of settings.

    Example:
        >>> type_words(list[int] | None), type_words(Literal["a", "b"])
        ('list of integers, or `null`', '`a`, `b`')
    """
    if annotation in WORDS:
        return WORDS[annotation]
    settings = settings_in(annotation)
    if settings:
        names = [kind.__name__ for kind in settings]
        links = [f"[{name}]({link}#{anchor(name)})" for name in names]
        return " or ".join(links) + _or_null(annotation)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{_value(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        shown = [type_words(part, link) for part in parts if part is not type(None)]
        return " or ".join(shown) + _or_null(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        held = next((part for part in parts if part is not Ellipsis), str)
        return f"list of {PLURALS.get(held, PLURALS.get(get_origin(held), _plural(held, link)))}"
    if isinstance(annotation, type):
        if issubclass(annotation, data.AnomalyData):
            return "a data set"
        if issubclass(annotation, Path):
            return "path"
        return f"`{annotation.__name__}`"
    return "any"


def _plural(annotation: Any, link: str) -> str:
    return type_words(annotation, link)


def _or_null(annotation: Any) -> str:
    return ", or `null`" if type(None) in get_args(annotation) else ""


def default_words(option: Option) -> str:
    """Return the default of an option, as YAML has it."""
    if option.default is inspect.Parameter.empty:
        return "required"
    if option.default is None or option.default == inspect.Parameter.empty:
        return "`null`"
    if settings_in(option.annotation):
        changed = _changes(option.default)
        return f"`{{{changed}}}`" if changed else "its defaults"
    return f"`{_value(option.default)}`"


def _changes(settings: Any) -> str:
    """Return the values of settings that differ from those of their class."""
    if not is_dataclass(settings):
        return ""
    defaults = {option.name: option.default for option in options_of(type(settings))}
    changed = [
        f"{name}: {_value(getattr(settings, name))}"
        for name, default in defaults.items()
        if default is not inspect.Parameter.empty and getattr(settings, name) != default
    ]
    return ", ".join(changed)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        shown = [_value(part) for part in value]
        return f"[{', '.join([*shown[:2], '...'] if len(shown) > MOST_ITEMS else shown)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(part)}' for key, part in value.items())}}}"
    return str(value) if str(value) else '""'


def rows(options: Iterable[Option], prefix: str, link: str = "") -> Iterator[list[str]]:
    """Yield the rows of a table of options."""
    for option in options:
        kind = type_words(option.annotation, link).replace("|", "\\|")
        default = default_words(option).replace("|", "\\|")
        yield [f"`{prefix}{option.name}`", kind, default, cell(option.text)]


HEAD = ("option", "values", "default", "meaning")


# -- pages -----------------------------------------------------------------------------------------


def nested(options: Iterable[Option], seen: dict[str, type]) -> None:
    """Collect the classes of settings in options, and in their options, in order."""
    for option in options:
        for kind in settings_in(option.annotation):
            if kind.__name__ not in seen:
                seen[kind.__name__] = kind
                nested(options_of(kind), seen)


def settings_sections(kinds: Mapping[str, type], users: Mapping[str, list[str]]) -> list[str]:
    """Return a section with a table for each class of settings."""
    lines = ["## Settings", "", "Groups of options that several classes have.", ""]
    for name, kind in kinds.items():
        lines += [f"### {name}", "", summary(kind), ""]
        if users.get(name):
            lines += [f"Options: {', '.join(f'`{path}`' for path in users[name])}.", ""]
        lines += table(HEAD, rows(options_of(kind), ""))
    return lines


def users_of(classes: Iterable[type], prefix: str) -> dict[str, list[str]]:
    """Return the option names of each class of settings, such as ``--model.backbone.*``."""
    users: dict[str, list[str]] = {}

    def visit(options: Iterable[Option], path: str) -> None:
        for option in options:
            for kind in settings_in(option.annotation):
                name = f"{path}{option.name}.*"
                if name not in users.setdefault(kind.__name__, []):
                    users[kind.__name__].append(name)
                    visit(options_of(kind), f"{path}{option.name}.")

    for kind in classes:
        visit(options_of(kind), prefix)
    return users


def classes_in(module: types.ModuleType, base: type, abstract: bool = False) -> list[type]:
    """Return the classes that a module exports, sorted by name."""
    kinds = [getattr(module, name) for name in module.__all__]
    chosen = [k for k in kinds if isinstance(k, type) and issubclass(k, base)]
    chosen = [k for k in chosen if inspect.isabstract(k) is abstract]
    return sorted(chosen, key=lambda kind: kind.__name__.lower())


def method_classes() -> list[type]:
    """Return all methods."""
    from lightning.pytorch import LightningModule

    return [k for k in classes_in(methods, LightningModule) if k is not methods.AnomalyMethod]


def data_classes() -> list[type]:
    """Return all data sets."""
    from lightning.pytorch import LightningDataModule

    kinds = classes_in(data, LightningDataModule)
    return [kind for kind in kinds if kind is not data.AnomalyData]


def methods_page() -> str:
    """Return the page of the options of all methods."""
    kinds = method_classes()
    lines = [
        NOTE,
        "# Options of the methods",
        "",
        "On the command line, an option is `--model.NAME`; in a configuration, it is the key",
        "`NAME` below `model.init_args`. `anomaly_clip test --model.help SDP` prints the same",
        "texts. An option with a group of settings has the options of its group, such as",
        "`--model.backbone.name`.",
        "",
        f"{links(kinds)}.",
        "",
    ]
    seen: dict[str, type] = {}
    for kind in kinds:
        options = options_of(kind)
        nested(options, seen)
        page = METHODS / f"{PAGES_OF_METHODS.get(kind.__name__, kind.__name__.lower())}.md"
        lines += [f"## {kind.__name__}", "", summary(kind), ""]
        if page.is_file():
            lines += [f"Idea, equations and results: [{page.stem}](../methods/{page.name}).", ""]
        lines += table(HEAD, rows(options, "--model."))
    return "\n".join([*lines, *settings_sections(seen, users_of(kinds, "--model."))])


def data_page() -> str:
    """Return the page of the options of all data sets."""
    kinds = data_classes()
    shared = {option.name: option for option in options_of(data.AnomalyData)}
    lines = [
        NOTE,
        "# Options of the data sets",
        "",
        "On the command line, an option is `--data.NAME`; in a configuration, it is the key",
        "`NAME` below `data.init_args`. `anomaly_clip test --data.help MVTecAD` prints the same",
        "texts.",
        "[data.md](../data.md) lists links, licences and layouts.",
        "",
        f"{links(kinds)}.",
        "",
        "## All data sets",
        "",
        *table(HEAD, rows(shared.values(), "--data.")),
    ]
    seen: dict[str, type] = {}
    nested(shared.values(), seen)
    for kind in kinds:
        options = options_of(kind)
        nested(options, seen)
        special = [o for o in options if o.name not in shared or _differs(o, shared[o.name])]
        absent = sorted(set(shared) - {option.name for option in options})
        lines += [f"## {kind.__name__}", "", summary(kind), ""]
        if kind.__name__ in DATASETS:
            info = DATASETS[kind.__name__]
            lines += [f"Licence: {info.licence}.", ""] if getattr(info, "licence", None) else []
        if special:
            lines += table(HEAD, rows(special, "--data."))
        rest = "the [options of all data sets](#all-data-sets)"
        if absent:
            rest += ", except " + ", ".join(f"`{name}`" for name in absent)
        lines += [f"{'Also' if special else 'It has'} {rest}.", ""]
    return "\n".join([*lines, *settings_sections(seen, users_of(kinds, "--data."))])


def _differs(option: Option, shared: Option) -> bool:
    return (str(option.default), option.text) != (str(shared.default), shared.text)


def experiments_page() -> str:
    """Return the page of fit, validate, test and predict."""
    verbs = [[f"`{verb}`", VERBS[verb][0]] for verb in EXPERIMENTS]
    general = [
        ("--config", "NAME or FILE", "a packaged configuration or a file; several are merged"),
        ("--model", "class", "the method, such as `SDP`, or the path of a class of your own code"),
        ("--data", "class", "the data set, such as `MVTecAD`, or the path of a class"),
        ("--ckpt_path", "FILE or RUN", "a checkpoint, or the folder of a run with one"),
        ("--seed_everything", "integer", "seed of all random numbers; default: `0`"),
        (
            "--calibrate",
            "true or false",
            "`fit` only: hold out normal images, calibrate on them",
        ),
        ("--print_config", "", "print the complete configuration and exit"),
        ("--model.help", "class", "list the options of a method"),
        ("--data.help", "class", "list the options of a data set"),
        ("--traceback", "", "show the traceback of an error"),
        ("--help", "", "list the options"),
    ]
    trainer = [option._replace(text=first_sentence(option.text)) for option in options_of(Trainer)]
    lines = [
        NOTE,
        "# Options of fit, validate, test and predict",
        "",
        *table(("verb", "effect"), verbs),
        "[commands.md](../commands.md) describes configurations, checkpoints and exit codes.",
        "",
        "## General options",
        "",
        *table(("option", "value", "meaning"), [(f"`{a}`", b, c) for a, b, c in general]),
        "## Method and data set",
        "",
        "`--model.*`: [options of the methods](methods.md).",
        "",
        "`--data.*`: [options of the data sets](data.md).",
        "",
        "## Output",
        "",
        *table(HEAD, rows(options_of(RunWriter), "--output.")),
        "## Calibration",
        "",
        "See [decisions.md](../decisions.md).",
        "",
        *table(HEAD, rows(options_of(CalibrationSettings), "--calibration.")),
        "## Trainer",
        "",
        "Options of Lightning's trainer, each with the first line of Lightning's own text.",
        "",
        *table(HEAD, rows(trainer, "--trainer.")),
    ]
    return "\n".join(lines)


# -- other verbs -----------------------------------------------------------------------------------


def parser_of(verb: str) -> argparse.ArgumentParser | str:
    """Return the parser that prints the help of a verb, or the help itself if none does."""
    printed: list[argparse.ArgumentParser] = []
    real = argparse.ArgumentParser.print_help

    def print_help(self: argparse.ArgumentParser, file: Any = None) -> None:
        printed.append(self)

    argparse.ArgumentParser.print_help = print_help  # type: ignore[method-assign]
    stream = io.StringIO()
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(io.StringIO()):
            main([verb, "--help"])
    finally:
        argparse.ArgumentParser.print_help = real  # type: ignore[method-assign]
    return printed[-1] if printed else stream.getvalue()


def usage_lines(usage: str) -> list[str]:
    """Return a block with the usage of a verb, a form per line."""
    return ["```text", *(line.strip() for line in usage.splitlines()), "```", ""]


def verbs_page() -> str:
    """Return the page of all verbs other than those of experiments."""
    verbs = [verb for verb in VERBS if verb not in EXPERIMENTS]
    lines = [
        NOTE,
        "# Options of the other verbs",
        "",
        "`anomaly_clip VERB --help` prints the same texts. `--data.*` stands for the",
        "[options of the data sets](data.md).",
        "",
        ", ".join(f"[{verb}](#{anchor(verb)})" for verb in verbs) + ".",
        "",
    ]
    for verb in verbs:
        parser = parser_of(verb)
        lines += [f"## {verb}", ""]
        if isinstance(parser, str):
            usage, description = parser.strip().split("\n\n")[:2]
            lines += [*usage_lines(usage.removeprefix("usage: ")), prose(description), ""]
            if verb == "calibrate":
                lines += table(HEAD, rows(options_of(CalibrationSettings), "--calibration."))
                lines += ["Also the [options of predict](experiments.md).", ""]
            continue
        form = parser.usage
        if form:
            lines += usage_lines(re.sub(r"%\(prog\)s", parser.prog, form))
        lines += [prose(parser.description or VERBS[verb][0]), ""]
        if listing := list(_verb_rows(parser)):
            lines += table(("option", "default", "meaning"), listing)
    return "\n".join(lines)


UNSET = (None, argparse.SUPPRESS)


def _verb_rows(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    formatter = parser._get_formatter()
    shown_data = False
    for action in parser._actions:
        names = list(action.option_strings) or [str(action.metavar or action.dest)]
        long = str(names[-1])
        text = str(action.help or "")
        if text == argparse.SUPPRESS or "help" in long.split(".")[-1].lstrip("-"):
            continue
        if text.startswith("Path to a configuration file"):  # a group, whose options follow
            continue
        if re.match(r"--(data|model)\b", long):
            if not shown_data:
                yield ["`--data`, `--data.*`", "", "the data set and its options"]
            shown_data = True
            continue
        if long == "--print_config":
            text = "print the complete configuration and exit"
        else:
            text = formatter._expand_help(action) if text else ""
        text = re.sub(r"\s*\((?:required, )?(?:type|default): .*\)$", "", text)
        text, _, stated = text.partition("; default: ")
        shown = names if action.option_strings else [name.upper() for name in names]
        label = ", ".join(f"`{name}`" for name in shown if not name.endswith("+"))
        default = stated
        if not stated and action.option_strings and action.default not in (*UNSET, False):
            default = f"`{_value(action.default)}`"
        if action.choices:
            text += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
        yield [label, default.replace("|", "\\|"), cell(text)]


PAGES = {
    "experiments.md": experiments_page,
    "verbs.md": verbs_page,
    "methods.md": methods_page,
    "data.md": data_page,
    "python.md": lambda: python_page(method_classes(), data_classes()),
}


def page(name: str) -> str:
    """Return the text of a page."""
    return PAGES[name]().rstrip("\n") + "\n"


def write() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.exit(0)
