"""Classes outside this package that a configuration would import, found without importing any.

The parser accepts a class in several forms: ``class_path``, a dotted name, and a text or the path
of a file that contains either. It imports what it finds while it validates; the search therefore
looks at the configuration as it is in the file, and into its texts and files.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from anomaly_clip.commands.yaml_text import read_yaml_text
from anomaly_clip.documents import DocumentError, check_yaml_limits, load_yaml
from anomaly_clip.errors import UserError
from anomaly_clip.files import printable

__all__ = [
    "check_found_config",
    "class_in_config",
    "concealed_classes",
    "foreign_classes",
    "seed_in_config",
]

CLASS_KEYS = {"model", "data", "auxiliary", "callbacks", "logger", "plugins", "strategy"}
CLASS_KEYS |= {"profiler", "augment", "optimizer", "lr_scheduler", "accelerator", "backbone"}
"""Options whose value may be the name of a class, in place of ``class_path``."""
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
LARGEST_FILE = 2**20
"""Bytes of the largest text file that is searched; larger ones count as configurations."""
DEEPEST = 60
"""Levels of a configuration that are searched; a deeper one refers to itself."""
Place = tuple[str, str, bool]
"""Dotted option, its value, and whether a class may stand there."""


def foreign_classes(config: Any, allowed: Sequence[str] = ()) -> list[str]:
    """Return the classes that a configuration names and that are not of this package.

    Args:
        config: A configuration, or a part of it.
        allowed: Names that are not returned.

    Raises:
        ValueError: If the configuration refers to itself.

    Example:
        >>> from anomaly_clip.commands.foreign_code import foreign_classes
        >>> foreign_classes({"model": {"class_path": "my_module.Mine"}, "data": "MVTecAD"})
        ['my_module.Mine']
    """
    names = dict.fromkeys(_class_names(config))
    return [n for n in names if not n.startswith("anomaly_clip.") and n not in allowed]


def concealed_classes(config: Any) -> list[str]:
    """Return the options whose text, or the file that it names, would be read as classes.

    Saved configurations have classes as mappings only, so that there is no reason for such a text.

    Args:
        config: A configuration, or a part of it.

    Raises:
        ValueError: If the configuration refers to itself.

    Example:
        >>> from anomaly_clip.commands.foreign_code import concealed_classes
        >>> concealed_classes({"model": {"init_args": {"backbone": "{class_path: a.B}"}}})
        ['model.init_args.backbone']
    """
    places = _places(config)
    return list(dict.fromkeys(o for o, text, is_class in places if _is_concealing(text, is_class)))


def check_found_config(file: Path) -> None:
    """Check a configuration that was found next to a checkpoint: nobody has named it.

    Its classes are of this package, or of libraries that are imported already, so that no module of
    the working folder is imported for a name in a file.

    Args:
        file: The configuration.

    Raises:
        UserError: If it names other classes, or cannot be read.
    """
    way_out = f"if you trust it, name it with --config {printable(str(file))}"
    config = _read_config(file)
    try:
        foreign = [name for name in foreign_classes(config) if not _is_imported(name)]
        concealed = concealed_classes(config)
    except (ValueError, RecursionError):
        raise UserError(f"{file} refers to itself: restore the file as it was saved") from None
    if foreign:
        names = ", ".join(printable(name) for name in foreign[:3])
        raise UserError(
            f"{file}, found next to the checkpoint, names code outside this package ({names}), "
            f"which would be run: {way_out}"
        )
    if concealed:
        raise UserError(
            f"{file}, found next to the checkpoint: {printable(concealed[0])} is a text or a file "
            f"that may name classes, whose code would be run: {way_out}"
        )


def class_in_config(file: Path) -> object:
    """Return ``model.class_path`` of a configuration; None if there is none.

    Raises:
        UserError: If the configuration cannot be read.
    """
    model = _read_config(file).get("model")
    return model.get("class_path") if isinstance(model, Mapping) else None


def seed_in_config(file: Path) -> int | None:
    """Return the seed of a run from its configuration; None without one.

    Raises:
        UserError: If the configuration cannot be read.
    """
    seed = _read_config(file).get("seed_everything")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _read_config(file: Path) -> Mapping[str, Any]:
    text = read_yaml_text(file, str(file))
    try:
        check_yaml_limits(text)
    except DocumentError as error:
        raise UserError(f"{file}: {error}: restore the file as it was saved") from None
    content = _parsed(text)
    return content if isinstance(content, Mapping) else {}  # the parser reports it


def _is_imported(name: str) -> bool:
    """Return whether a class is in an imported module, and of a kind that runs no code by name."""
    module, _, last = name.rpartition(".")
    kind = getattr(sys.modules.get(module), last, None)
    return isinstance(kind, type) and issubclass(kind, _imported_kinds())


def _imported_kinds() -> tuple[type, ...]:
    """Return the kinds of classes that a configuration may name if their module is imported."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import CheckpointIO, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    kinds = (LightningModule, LightningDataModule, Callback, Logger, Profiler, Strategy)
    return (*kinds, nn.Module, Optimizer, LRScheduler, CheckpointIO, Precision)


def _class_names(config: Any) -> Iterator[str]:
    """Yield the dotted names of classes in a configuration."""
    for option, value, in_place_of_class in _places(config):
        if option.rpartition(".")[2] == "class_path":
            if "." in value:
                yield value
        elif DOTTED.fullmatch(value) and (in_place_of_class or _is_module(value.split(".")[0])):
            yield value


def _places(
    content: Any, option: str = "", is_class: bool = False, depth: int = 0
) -> Iterator[Place]:
    """Yield all texts of a configuration."""
    if depth > DEEPEST:
        raise ValueError("it refers to itself")
    if isinstance(content, Mapping):
        for key, value in content.items():
            name = f"{option}.{key}".removeprefix(".").rstrip("+")  # "callbacks+" adds to a list
            last = name.rpartition(".")[2]
            yield from _places(value, name, last in CLASS_KEYS, depth + 1)
    elif isinstance(content, list | tuple):
        for entry in content:
            yield from _places(entry, option, is_class, depth + 1)
    elif isinstance(content, str | Path):
        yield option, str(content), is_class


def _is_module(name: str) -> bool:
    """Return whether an import would find a module, such as one that an option names."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _is_concealing(text: str, is_class: bool) -> bool:
    """Return whether a parser may read classes from a text or from the file that it names."""
    file = _file(text)
    if file is None:
        content = _parsed(text)
        return isinstance(content, dict | list) and _has_classes(content, is_class)
    if is_class:
        return True
    try:
        with file.open("rb") as stream:
            start = stream.read(LARGEST_FILE + 1)
        if b"\0" in start:  # an image or weights: YAML and JSON have no such byte
            return False
        content = _parsed(start.decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return len(start) > LARGEST_FILE or _has_classes(content, True)


def _has_classes(content: Any, is_class: bool) -> bool:
    """Return whether a parsed text has anything that may be a class."""
    try:
        for option, text, in_place_of_class in _places(content, "", is_class):
            dotted = DOTTED.fullmatch(text) is not None
            name = option.rpartition(".")[2]
            if name == "class_path" or (
                dotted and (in_place_of_class or _is_module(text.split(".")[0]))
            ):
                return True
            nested = _parsed(text)
            if isinstance(nested, dict | list) and nested and nested != content:
                if _has_classes(nested, in_place_of_class):
                    return True
            elif in_place_of_class and _file(text) is not None:
                return True
    except (ValueError, RecursionError):
        return True
    return False


def _parsed(text: str) -> Any:
    """Return what a text is in YAML; None if it is not valid."""
    try:
        return load_yaml(text, jsonargparse.get_loader("yaml"))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):
        return None


def _file(text: str) -> Path | None:
    try:
        file = Path(text).expanduser()
        return file if file.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None
