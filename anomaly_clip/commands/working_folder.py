"""Classes of the working folder: ``--model my_module.MyMethod`` imports ``my_module.py``.

Only names that a user has typed are imported, on this command line or in a ``--config`` that it
names; never a name in a checkpoint, in the folder of a run or in a configuration found there. The
folder is searched after the installed modules, and only while these modules are imported, so that
a ``torch.py`` in it does not replace the library.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.configs import config_file
from anomaly_clip.commands.named_classes import option_pairs
from anomaly_clip.documents import load_yaml
from anomaly_clip.errors import UserError, suggest
from anomaly_clip.files import printable

__all__ = ["import_named_classes"]

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST_FILE = 2**20
"""Bytes of the largest file that is searched for names."""
DEEPEST = 4
"""Number of files that refer to the next one."""
NAMES = ("allow",)
"""Options of other verbs whose value is the name of a class."""


def import_named_classes(words: Sequence[str]) -> None:
    """Import the modules of the working folder that a command line names.

    Args:
        words: The verb and its options, as typed.

    Raises:
        UserError: If a module is neither installed nor in the working folder.
    """
    for option, name in _typed_names(words):
        _import(option, name)


def _typed_names(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield options and the dotted names of classes that are their values."""
    for key, value in option_pairs(words[1:]):
        if value is None or value.lower() == "null":
            continue
        if key in ("config", "c"):
            yield from _names_in_file(Path(config_file(value)).expanduser(), f"--config {value}")
        elif key in NAMES:
            yield f"--{key} {value}", value
        else:
            yield from _names(key.replace(".init_args.", "."), _parsed(value), f"--{key} {value}")


def _names(key: str, value: Any, origin: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the names in the value of an option, or in the file that stands for the value."""
    from anomaly_clip.commands.foreign_code import foreign_classes

    content = {key: value}
    if isinstance(value, str) and value.endswith(SUFFIXES):
        if depth < DEEPEST and "." not in key.rstrip("+").removeprefix("trainer."):
            yield from _names_in_file(Path(value).expanduser(), origin, depth + 1)
        return
    try:
        names = foreign_classes(content)
    except (ValueError, RecursionError):  # it refers to itself; the parser reports it
        return
    yield from ((origin, name) for name in names)


def _names_in_file(file: Path, origin: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return
        content = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the parser reports it
        return
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from _names(str(key), value, origin, depth)


def _parsed(text: str) -> Any:
    try:
        return load_yaml(text)
    except (ValueError, yaml.YAMLError):
        return text


def _import(origin: str, name: str) -> None:
    """Import the module of a class, if it is not installed.

    Raises:
        UserError: If there is no such module.
    """
    top, *rest = name.split(".")[:-1]
    folder = Path.cwd()
    origin_of_top = getattr(sys.modules.get(top), "__file__", None)
    is_loaded = top in sys.modules and not _is_in(origin_of_top, folder)
    if is_loaded or not top.isidentifier() or _is_installed(top):
        if not rest:
            _check_not_hidden(origin, top, name.rpartition(".")[2])
        return  # the parser imports it
    if not (folder / f"{top}.py").is_file() and not (folder / top).is_dir():
        raise UserError(
            f"{printable(origin)}: no module {printable(top)}.py in this folder "
            f"({printable(str(folder))}) nor installed: correct the name {printable(name)}, or "
            f"change to its folder"
        )
    with _searched_last(str(folder)):
        module = top
        importlib.import_module(module)
        for part in rest:
            module = f"{module}.{part}"
            if importlib.util.find_spec(module) is None:
                break
            importlib.import_module(module)
        else:
            _check_class(origin, module, name.rpartition(".")[2])


def _check_class(origin: str, module: str, name: str) -> None:
    """Check that a module has a class.

    Raises:
        UserError: If it does not.
    """
    names = vars(sys.modules[module])
    if name not in names:
        classes = [n for n, kind in names.items() if getattr(kind, "__module__", "") == module]
        hint = suggest(name, [n for n in classes if isinstance(names[n], type)])
        raise UserError(
            f"{printable(origin)}: {module} has no class {printable(name)}; "
            f"{hint or 'correct the name'}"
        )


def _check_not_hidden(origin: str, top: str, name: str) -> None:
    """Check that a file of the working folder does not have the name of an installed module.

    Raises:
        UserError: If it does, and the installed module has no such class.
    """
    file = Path.cwd() / f"{top}.py"
    if not file.is_file() or hasattr(importlib.import_module(top), name):
        return
    installed = getattr(sys.modules[top], "__file__", None)
    if installed is None or Path(installed) != file:
        raise UserError(
            f"{printable(origin)}: {top}.py in this folder is not imported, as an installed module "
            f"has the name {top}: rename the file"
        )


def _is_installed(top: str) -> bool:
    if top in sys.modules:
        return False
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return True


def _is_in(file: str | None, folder: Path) -> bool:
    return file is not None and Path(file).parent == folder


@contextmanager
def _searched_last(folder: str) -> Iterator[None]:
    sys.path.append(folder)
    importlib.invalidate_caches()  # files may be newer than the last look at the folder
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
