"""``anomaly_clip configs``: lookup of the package's configurations by name.

``--config sdp`` means ``configs/sdp.yaml`` of this package in any working directory, unless the
working directory contains a file of that name. This module imports no heavy library.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from anomaly_clip.commands.yaml_text import check_config
from anomaly_clip.errors import UserError

__all__ = ["config_file", "config_names", "expand_configs", "run_configs"]

PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Folder of the configurations in an installed wheel, and in a checkout of the repository."""
SUFFIX = ".yaml"


def config_folder() -> Path:
    """Return the folder of the configurations that come with the package.

    Raises:
        UserError: If it is missing from the installation.
    """
    for folder in FOLDERS:
        if (folder / f"sdp{SUFFIX}").is_file():
            return folder
    raise UserError(
        f"{FOLDERS[0]}: the configurations of anomaly_clip are missing: reinstall the package"
    )


def config_names() -> list[str]:
    """Return the names of all configurations, such as ``sdp`` and ``data/visa``."""
    folder = config_folder()
    files = (file.relative_to(folder) for file in folder.rglob(f"*{SUFFIX}"))
    return sorted(file.with_suffix("").as_posix() for file in files)


def config_file(name: str) -> str:
    """Return the file that a value of ``--config`` refers to.

    An existing file is returned as it is. Otherwise ``sdp``, ``sdp.yaml`` and ``configs/sdp.yaml``
    all refer to the package's configuration; any other name is returned unchanged.

    Example:
        >>> from pathlib import Path
        >>> from anomaly_clip.commands.configs import config_file
        >>> Path(config_file("data/visa")).name
        'visa.yaml'
        >>> config_file("mine.yaml")
        'mine.yaml'
    """
    if Path(name).expanduser().is_file():
        return name
    stem = name.removeprefix("configs/").removesuffix(SUFFIX)
    return str(config_folder() / f"{stem}{SUFFIX}") if stem in config_names() else name


def expand_configs(words: Sequence[str]) -> list[str]:
    """Replace configuration names after ``--config`` by their files.

    Raises:
        UserError: If a value is neither a file nor the name of a configuration, or if the file is
            not a configuration.
    """
    return list(_expanded(words))


def _expanded(words: Sequence[str]) -> Iterator[str]:
    is_value = False
    for word in words:
        if is_value:
            yield _checked(word)
        elif word.startswith("--config="):
            yield f"--config={_checked(word.removeprefix('--config='))}"
        else:
            yield word
        is_value = word in ("--config", "-c")


def _checked(name: str) -> str:
    file = config_file(name)
    if file == name and not Path(name).suffix and not Path(name).expanduser().exists():
        near = difflib.get_close_matches(name.removeprefix("configs/"), config_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--config {name}: neither a file nor a configuration of the package; "
            f"{hint}anomaly_clip configs lists all configurations"
        )
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"--config {name} is a folder: name a file in it")
    if path.is_file():  # a pipe can be read only once
        check_config(path, f"--config {name}")
    return file


def run_configs(words: Sequence[str]) -> int:
    """Print the names of all configurations or the text of one; return an exit code.

    Raises:
        UserError: If no configuration has the given name.
    """
    parser = argparse.ArgumentParser(
        prog="anomaly_clip configs",
        description="List the configurations that come with the package, each with a one-line "
        "summary. Given a name, print that configuration, as a template for your own.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="configuration to print, such as sdp or data/visa")
    name = parser.parse_args(list(words[1:])).name
    if name is not None:
        print(Path(_checked(name)).read_text(encoding="utf-8"), end="")
        return 0
    names = config_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {_summary(config_folder() / f'{name}{SUFFIX}')}".rstrip())
    return 0


def _summary(file: Path) -> str:
    """Return the start of a file's leading comment, up to the first full stop or command."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in takewhile(_is_comment, lines)]
    return " ".join(comment).partition(". ")[0].partition(" anomaly_clip ")[0].rstrip(".")


def _is_comment(line: str) -> bool:
    return line.startswith("#")
