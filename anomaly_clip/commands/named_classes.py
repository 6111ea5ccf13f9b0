"""The method and the data set that a command line names, with their configured values.

Nothing is imported: the command line and its configurations are only read, as for ``--help``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.configs import expand_configs
from anomaly_clip.commands.source_options import ClassSource, find_class
from anomaly_clip.commands.yaml_text import read_yaml_text
from anomaly_clip.documents import load_yaml
from anomaly_clip.errors import UserError
from anomaly_clip.results.folder import find_run

__all__ = ["MODULES", "NamedClass", "NamedOptions", "named_options", "option_pairs"]

MODULES = {"model": ("anomaly_clip.methods",), "data": ("anomaly_clip.data",)}
"""Modules of the classes that are named without a module."""


@dataclass
class NamedClass:
    """A class that was named, and where.

    Args:
        name: The name as given.
        origin: The option or the file that names it.
        source: Its source; None if it is not found.
    """

    name: str
    origin: str
    source: ClassSource | None


@dataclass
class NamedOptions:
    """Content of a command line and its configurations.

    Args:
        classes: The classes of ``model`` and ``data``, if they are named.
        values: Configured values by dotted option, such as ``model.sigma``.
    """

    classes: dict[str, NamedClass] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def named_options(words: Sequence[str]) -> NamedOptions:
    """Return what a command line names.

    Args:
        words: The verb and its options; options that do not exist are ignored.

    Raises:
        UserError: If a configuration does not exist, or cannot be read.
    """
    named = NamedOptions()
    pairs = list(option_pairs(words[1:]))
    files = list(option_pairs(expand_configs(words)[1:]))
    configs = {
        Path(file).expanduser(): f"--config {name}"
        for (key, name), (_, file) in zip(pairs, files, strict=True)
        if key in ("config", "c") and file
    }
    if not configs and "model" not in {key for key, _ in pairs}:
        configs = {f: str(f) for f in _config_of_fit(dict(pairs).get("ckpt_path"))}
    for path, origin in configs.items():
        _add_file(named, path, origin)
    for key, value in pairs:
        if value is None:
            continue
        if key in MODULES:
            _set_class(named, key, value, f"--{key} {value}")
        elif "." in key:
            key = key.replace(".init_args.", ".")
            named.values[key.rstrip("+")] = _read(value)
    return named


def option_pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line with their values.

    Args:
        words: Options without the verb.

    Example:
        >>> from anomaly_clip.commands.named_classes import option_pairs
        >>> list(option_pairs(["--model=SDP", "--model.sigma", "-1", "--dry-run"]))
        [('model', 'SDP'), ('model.sigma', '-1'), ('dry-run', None)]
    """
    for place, word in enumerate(words):
        if not word.startswith("-") or word[1:2].isdigit():  # a negative number is a value
            continue
        key, equals, value = word.lstrip("-").partition("=")
        following = words[place + 1] if place + 1 < len(words) else "-"
        if equals:
            yield key, value
        else:
            is_value = not following.startswith("-") or following[1:2].isdigit()
            yield key, following if is_value else None


def _config_of_fit(checkpoint: str | None) -> list[Path]:
    """Return the configuration of the fit that wrote a checkpoint, if it is next to it."""
    if checkpoint is None:
        return []
    path = find_run(Path(checkpoint).expanduser())
    folders = [path] if path.is_dir() else list(path.resolve().parents)[:2]
    return [f / "config-fit.yaml" for f in folders if (f / "config-fit.yaml").is_file()][:1]


def _add_file(named: NamedOptions, file: Path, origin: str) -> None:
    if not file.exists():
        raise UserError(f"{origin}: file does not exist")
    if not file.is_file():  # a pipe, which can be read only once
        return
    try:
        content = load_yaml(read_yaml_text(file, str(file)))
    except (yaml.YAMLError, ValueError, UserError):  # as --config has been checked: a run's
        return
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if key not in MODULES or not isinstance(value, str | Mapping):
            _set_values(named, str(key), value)
            continue
        class_path = value if isinstance(value, str) else value.get("class_path")
        if isinstance(class_path, str):
            _set_class(named, key, class_path, origin)
        if isinstance(value, Mapping):
            _set_values(named, key, value.get("init_args", {}))


def _set_class(named: NamedOptions, key: str, name: str, origin: str) -> None:
    source = find_class(name, MODULES[key], str(Path.cwd()))
    named.classes[key] = NamedClass(name, origin, source)


def _set_values(named: NamedOptions, key: str, value: Any) -> None:
    """Set an option; the entries of a mapping are options, too."""
    key = key.rstrip("+")
    named.values[key] = value
    for name, part in value.items() if isinstance(value, Mapping) else ():
        _set_values(named, f"{key}.{name}", part)


def _read(text: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
