"""Parser of all verbs: option values arrive as typed, and saved configurations are read back.

jsonargparse reads the value of an option of a class, such as ``--data.categories``, as YAML, and
passes its Python spelling on to the parser of that class. ``null`` then arrives as the text
``None``, and ``[01, 02]`` as ``[1, 2]``. It also writes ``6E2`` without quotes, which its reader
takes for a number.
"""

from __future__ import annotations

import json
import re
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from anomaly_clip.documents import DocumentError, check_value, load_yaml
from anomaly_clip.errors import UserError

__all__ = ["OptionParser", "check_used", "dump_yaml", "import_classes"]

MARK = '"\N{OBJECT REPLACEMENT CHARACTER}'
"""Start of a value in transit. YAML reads it as a text, so jsonargparse does not change it."""


PACKED = re.compile(MARK + r'(?:[^"\\]|\\.)*"')


class OptionParser(LightningArgumentParser):
    """Lightning's parser, in which options of a class have the same values as in a file.

    jsonargparse parses the options of a class with another parser of this type, and those of a
    class in that class with yet another one. It calls ``parse_object`` for ``--data.shots`` and
    ``parse_args`` for ``--data.resize.size``.
    """

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        """Parse arguments; see jsonargparse."""
        words = args if args is None else list(self._protected(_names_first(args)))
        return super().parse_args(words, *more, **options)

    def parse_object(self, obj: Any, *more: Any, **options: Any) -> Any:
        """Parse the options of an object; see jsonargparse."""
        for name, value in vars(obj).items() if isinstance(obj, Namespace) else ():
            if isinstance(value, str) and value.startswith(MARK):
                obj[name] = value = self._value(f"--{name}", value)
            action = self._option_string_actions.get(f"--{name}")
            if value in (None, "null") and action is not None and _type_of(action) is None:
                raise ValueError(f"{name} is null, but has settings: leave it out for its defaults")
        return super().parse_object(obj, *more, **options)

    def error(self, message: str, *more: Any, **options: Any) -> NoReturn:
        """Raise an error with the values as typed; see jsonargparse."""
        super().error(PACKED.sub(lambda match: _unpacked(match[0]), message), *more, **options)

    def _protected(self, words: Sequence[str]) -> Iterator[str]:
        """Yield the words with values that reach the option that they are for unchanged."""
        name = None
        for word in words:
            if word.startswith("--"):
                key, equals, value = word.partition("=")
                name = None if equals else key
                yield f"{key}={self._value(key, value)}" if equals else word
            else:
                yield word if name is None else self._value(name, word)
                name = None

    def _value(self, option: str, value: str) -> str:
        value = _unpacked(value)
        try:
            check_value(value)
        except DocumentError as error:
            raise ValueError(f"{option.lstrip('-')}: {error}") from None
        actions: Mapping[str, Action] = self._option_string_actions
        if option in actions:
            kind = _type_of(actions[option])
            is_list = not (_is_mapping(kind) or _may_be_text(kind))
            return _as_texts(value, is_list) if _holds_texts(kind) else value
        parts = option.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((actions[name] for name in owners if name in actions), None)
        # The keys of a mapping are no options, so no other parser unpacks their values.
        if owner is None or "dict_kwargs" in parts or _is_mapping(_type_of(owner)):
            return value
        return _packed(value)


def _names_first(words: Sequence[str]) -> list[str]:
    """Return the words with the name of a backbone before its other options.

    All kinds of backbones have a name. After options of one kind, such as ``pretrained``, the name
    would be taken for that of another kind, and these options would be lost.

    Example:
        >>> _names_first(["fit", "--model.backbone.pretrained", "demo", "--model.backbone.name=x"])
        ['fit', '--model.backbone.name=x', '--model.backbone.pretrained', 'demo']
    """
    options: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            options.append([])
        options[-1].append(word)
    for option in options[1:]:
        name, _, _ = option[0].partition("=")
        if name.endswith(".backbone.name"):
            owner = name.removesuffix("name")
            first = next(n for n, other in enumerate(options) if other and owner in other[0])
            options.remove(option)
            options.insert(first, option)
    return [word for option in options for word in option]


def import_classes(*packages: ModuleType) -> None:
    """Import all names of packages: a parser finds the short names of imported classes only."""
    for package in packages:
        for name in package.__all__:
            getattr(package, name)


def check_used(words: Sequence[str], options: Namespace) -> None:
    """Check that all typed options of settings are part of the settings that were parsed.

    An option may take one of several kinds of settings, such as those of a CLIP model or of a CNN.
    jsonargparse discards those of one kind when an option of another kind follows.

    Args:
        words: Words of the command line.
        options: The parsed options of the verb.

    Raises:
        UserError: If an option was discarded.
    """
    typed = [word.removeprefix("--").partition("=")[0].split(".") for word in words]
    for path in typed:
        settings = _settings_at(path[:-1], options)
        if settings is not None and path[-1] not in (*vars(settings), "help"):
            kept = [other[-1] for other in typed if other[:-1] == path[:-1]]
            others = " and ".join(dict.fromkeys(name for name in kept if name in vars(settings)))
            raise UserError(
                f"{'.'.join(path)} does not go with {others or ', '.join(vars(settings))}: these "
                f"options are of different kinds of settings, so leave one of them out"
            )


def _settings_at(path: Sequence[str], options: Namespace) -> Namespace | None:
    """Return the settings at a path of options; None for anything else, such as a class."""
    node: Any = options
    for name in path:
        if not isinstance(node, Namespace) or name not in node:
            return None
        node = node[name]
        if isinstance(node, Namespace) and "init_args" in node and name != path[-1]:
            node = node["init_args"]
    is_settings = isinstance(node, Namespace) and "class_path" not in node and len(path) > 1
    return node if is_settings else None


def dump_yaml(content: Any) -> str:
    """Return YAML that jsonargparse and PyYAML both read as the same content."""
    return yaml.dump(
        content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )


class _Dumper(yaml.SafeDumper):
    """Writer that puts a text into quotes if jsonargparse would read something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quotes = "'" if text.isprintable() else '"'  # with escapes
    style = None if _read(text) == text else quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
jsonargparse.set_dumper("yaml", dump_yaml)


def _read(text: str) -> Any:
    """Return what jsonargparse reads; None if it is not valid YAML."""
    try:
        return load_yaml(text, jsonargparse.get_loader("yaml"))
    except yaml.YAMLError:
        return None


def _packed(value: str) -> str:
    """Return a value that jsonargparse does not change, unless it would not change it anyway."""
    if isinstance(_read(value), str | bool | int | float):  # passed on as typed
        return value
    return MARK + json.dumps(value)[1:]


def _unpacked(value: str) -> str:
    return str(json.loads('"' + value.removeprefix(MARK))) if value.startswith(MARK) else value


def _as_texts(value: str, is_list: bool) -> str:
    """Return ``[01, yes]`` or ``{01: no}`` with quotes around all texts.

    In place of a list, other values are put into quotes, so that messages show what was typed.
    """
    try:
        content = load_yaml(value, partial(yaml.load, Loader=yaml.BaseLoader))
    except yaml.YAMLError:
        return value
    if is_list and not isinstance(content, list) and value != "null":
        return json.dumps(value)
    items = [*content, *content.values()] if isinstance(content, dict) else content
    is_plain = isinstance(items, list) and all(isinstance(item, str) for item in items)
    return json.dumps(content) if is_plain else value


def _type_of(action: Action) -> Any:
    return getattr(action, "_typehint", None)  # argparse's own actions have none


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _holds_texts(kind: Any) -> bool:
    """Return whether the lists and mappings of a type, if it has any, hold texts only."""
    held = [part for part in _alternatives(kind) if get_origin(part) in (list, Sequence, dict)]
    return bool(held) and all(set(get_args(part)) == {str} for part in held)


def _may_be_text(kind: Any) -> bool:
    """Return whether a type allows a text, or one of several words."""
    return any(part is str or get_origin(part) is Literal for part in _alternatives(kind))


def _is_mapping(kind: Any) -> bool:
    return any((get_origin(part) or part) in (dict, Mapping) for part in _alternatives(kind))
