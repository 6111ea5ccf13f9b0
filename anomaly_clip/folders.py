"""Folders of images: names that are passed over, regular files, links that are followed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from anomaly_clip.files import name_key
from anomaly_clip.images import is_image

__all__ = [
    "FolderContent",
    "FolderTree",
    "find_inner",
    "image_files",
    "images_in",
    "is_passed_over",
    "is_run",
    "scan",
    "subfolders",
]

PASSED_OVER = (".", "@", "$", "__")
"""First characters of names that systems give to their own files, such as ``@eaDir``."""
WINDOWS_FILES = ("thumbs.db", "desktop.ini")
RUN_FILES = tuple(f"config-{verb}.yaml" for verb in ("fit", "validate", "test", "predict"))
"""Files of which the folder of a run contains at least one."""


class FolderContent(NamedTuple):
    """Content of one folder, sorted by name."""

    images: list[Path]
    """Regular files with the name of an image, also through a link."""
    folders: list[Path]
    """Folders, also through a link."""
    missing: list[Path]
    """Links with the name of an image that lead to no file."""
    irregular: list[Path]
    """Pipes, sockets and devices with the name of an image, which are never opened."""
    passed_over: list[Path]
    """Images and folders whose names begin with ``@``, ``$`` or ``__``."""
    others: list[Path]
    """Other regular files, except hidden ones and those that Windows writes."""


def is_passed_over(name: str) -> bool:
    """Return whether a name is one of those that systems give to their own files and folders."""
    return name.startswith(PASSED_OVER)


def scan(folder: Path) -> FolderContent:
    """Return the content of a folder; empty if the folder is missing.

    Raises:
        PermissionError: If the folder cannot be read.
    """
    content: dict[str, list[Path]] = {name: [] for name in FolderContent._fields}
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = _kind_of(entry)
                if kind is not None:
                    content[kind].append(folder / entry.name)
    return FolderContent(**{name: sorted(paths) for name, paths in content.items()})


def _kind_of(entry: os.DirEntry[str]) -> str | None:
    """Return the field of :class:`FolderContent` that an entry belongs to; None if to none."""
    name, path = entry.name, Path(entry.path)
    if name.startswith("."):
        return None
    passed_over = is_passed_over(name)
    # An entry that is no link knows its kind without another look at the disk.
    if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
        return "passed_over" if passed_over else "folders"
    if os.path.isfile(path) if entry.is_symlink() else entry.is_file():
        if is_image(path):
            return "passed_over" if passed_over else "images"
        return None if passed_over or name.lower() in WINDOWS_FILES else "others"
    if passed_over or path.suffix.lower() not in Image.registered_extensions():
        return None
    return "missing" if entry.is_symlink() and not os.path.exists(path) else "irregular"


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted; none if the folder is missing.

    Links that lead to no file are listed too, so that their images are reported as missing.

    Raises:
        PermissionError: If the folder cannot be read.
    """
    content = scan(folder)
    return sorted([*content.images, *content.missing])


def subfolders(folder: Path) -> list[Path]:
    """Return the visible subfolders of a folder, sorted; none if the folder is missing.

    Raises:
        PermissionError: If the folder cannot be read.
    """
    return scan(folder).folders


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, whose images this package drew itself."""
    return any((folder / name).is_file() for name in RUN_FILES)


def find_inner(folder: Path, *names: str) -> Path:
    """Return ``folder/name/...``; letters with accents may be written in another normal form."""
    for name in names:
        inner = folder / name
        if not os.path.lexists(inner):
            same = [f for f in subfolders(folder) if name_key(f.name) == name_key(name)]
            inner = same[0] if same else inner
        folder = inner
    return folder


class FolderTree:
    """All folders below others, each listed once, whatever links lead to it.

    Real folders come before links. A link to a folder that contains the link itself or ``root`` is
    not followed.

    Args:
        root: Folder that a link must not lead above.
        content: Returns the content of a folder; default: :func:`scan`.
    """

    def __init__(self, root: Path, content: Callable[[Path], FolderContent] = scan) -> None:
        self.start = root
        self.root = Path(os.path.realpath(root))
        self.content = content
        self.visited: set[Path] = set()
        self.repeated: list[Path] = []
        """Folders that are listed elsewhere, and links to folders that contain them."""
        self.closed: list[Path] = []
        """Folders that cannot be read."""

    def copy(self) -> FolderTree:
        """Return another tree, which does not list the folders that this one has listed."""
        tree = FolderTree(self.start, self.content)
        tree.visited = set(self.visited)
        return tree

    def below(
        self, folders: Sequence[Path], enters: Callable[[Path], bool] = lambda folder: True
    ) -> dict[Path, list[Path]]:
        """Return each folder with itself and the folders below it, sorted.

        Args:
            folders: The folders to begin with.
            enters: Returns whether to enter a folder; default: always.
        """
        listed: dict[Path, list[Path]] = {folder: [] for folder in folders}
        links = [(folder, folder) for folder in listed if folder.is_symlink()]
        for top in [folder for folder in listed if not folder.is_symlink()]:
            links += self._descend(top, top, listed[top], enters)
        while links:
            top, link = links.pop(0)
            links += self._descend(top, link, listed[top], enters)
        return {folder: sorted(inner) for folder, inner in listed.items()}

    def _descend(
        self, top: Path, start: Path, listed: list[Path], enters: Callable[[Path], bool]
    ) -> list[tuple[Path, Path]]:
        """List a folder and all real folders below it; return the links among them."""
        links: list[tuple[Path, Path]] = []
        stack = [start]
        while stack:
            folder = stack.pop()
            real = Path(os.path.realpath(folder))
            if real in self.visited or self._leads_up(folder, real):
                self.repeated.append(folder)
            elif not os.access(folder, os.R_OK | os.X_OK):
                self.closed.append(folder)
            elif enters(folder):
                self.visited.add(real)
                listed.append(folder)
                inner = self.content(folder).folders
                links += [(top, f) for f in inner if f.is_symlink()]
                stack += [f for f in inner if not f.is_symlink()]
        return links

    def _leads_up(self, folder: Path, real: Path) -> bool:
        if folder == self.start or not folder.is_symlink():
            return False
        place = Path(os.path.realpath(folder.parent))
        return place.is_relative_to(real) or self.root.is_relative_to(real)


def image_files(root: Path, runs: list[Path] | None = None) -> Iterator[Path]:
    """Yield the images of all folders below ``root``, except what runs have drawn.

    Args:
        root: The folder.
        runs: List to which the folders of runs are added.
    """

    def enters(folder: Path) -> bool:
        if folder == root or not is_run(folder):
            return True
        if runs is not None:
            runs.append(folder)
        return False

    for folder in FolderTree(root).below([root], enters)[root]:
        yield from images_in(folder)
