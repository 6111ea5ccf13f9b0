"""Single images and patterns such as ``photos/**/*.JPG`` in place of a user's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anomaly_clip.data.path_patterns import PatternSearch, leave_out
from anomaly_clip.folders import scan
from anomaly_clip.images import is_image

__all__ = ["WILDCARDS", "PathSelection", "Selected"]

WILDCARDS = "*?["
SHOWN = 3  # names listed in an error message


@dataclass
class Selected:
    """Images and folders of a selection.

    Attributes:
        images: Images, sorted.
        folders: Folders whose images are taken; only if no image itself was found.
        left_out: What matches, but is not used, by description.
    """

    images: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)


class PathSelection:
    """Images named by ``data.root``: one image, a pattern, or a list of images, folders, patterns.

    In a pattern, ``*``, ``?`` and ``[...]`` stand for parts of a name, and ``**`` for any number of
    folders. A path that exists is no pattern, whatever its name.

    Args:
        names: The paths and patterns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._parts = [_split(Path(name).expanduser()) for name in self.names]

    @property
    def is_folder(self) -> bool:
        """True if the selection is one folder, or one path that does not exist."""
        return len(self._parts) == 1 and self._is_folder(*self._parts[0])

    @property
    def folder(self) -> Path:
        """The folder of all images, as far as it is known without reading it."""
        folders = [
            p if self._is_folder(p, parts) or parts else p.parent for p, parts in self._parts
        ]
        if len({folder.is_absolute() for folder in folders}) > 1:
            folders = [folder.absolute() for folder in folders]
        if len(folders) == 1:
            return folders[0]
        return Path(os.path.commonpath(folders)) if folders else Path()

    def __str__(self) -> str:
        """Return the paths and patterns as typed."""
        return ", ".join(self.names)

    def find(self) -> Selected:
        """Find the images.

        Raises:
            FileNotFoundError: If a path does not exist, or a pattern matches nothing.
            ValueError: If a path is not an image, or a pattern matches no image.
        """
        absolute = self.folder.is_absolute()
        selected = Selected()
        for name, (path, parts) in zip(self.names, self._parts, strict=True):
            start = path.absolute() if absolute else path
            if parts:
                self._match(name, start, parts, selected)
            elif start.is_dir():
                selected.folders.append(start)
            elif not start.exists():
                raise FileNotFoundError(
                    f"data.root {name}: there is no such file or folder; correct the path"
                )
            elif start.is_file() and is_image(start):
                selected.images.append(start)
            else:
                raise ValueError(
                    f"data.root {name}: not an image of a known format; give images, a folder or "
                    f"a pattern"
                )
        selected.images = sorted(set(selected.images))
        return selected

    def _match(self, name: str, start: Path, parts: Sequence[str], selected: Selected) -> None:
        matching = PatternSearch(selected.left_out)
        paths = sorted(set(matching.paths(start, parts)))
        if not paths:
            raise FileNotFoundError(
                f"data.root {name}: there is no such file, and as a pattern it matches nothing; "
                f"{start}{os.sep} contains {_examples(start)}"
            )
        images = [path for path in paths if path in matching.images]
        folders = [path for path in paths if path.is_dir()]
        others = [path for path in paths if path not in images and path not in folders]
        if not images and not folders:
            raise ValueError(
                f"data.root {name}: matches no image, but {_shown(others)}; correct the pattern"
            )
        selected.images += images
        if images:
            leave_out(selected.left_out, "folders that match the pattern", folders)
        else:
            selected.folders += folders
        leave_out(selected.left_out, "other files that match the pattern", others)

    @staticmethod
    def _is_folder(path: Path, parts: Sequence[str]) -> bool:
        return not parts and (path.is_dir() or not path.exists())


def _split(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Split a path into its beginning, as far as it exists, and the parts of a pattern."""
    if os.path.lexists(path) or not any(set(WILDCARDS) & set(part) for part in path.parts):
        return path, ()
    start, parts = Path(path.anchor), list(path.parts[1:] if path.anchor else path.parts)
    while parts and os.path.lexists(start / parts[0]):
        start /= parts.pop(0)
    return start, tuple(parts)


def _examples(folder: Path) -> str:
    """Return a few names of a folder's content, images first."""
    content = scan(folder)
    names = [*content.images, *content.folders]
    return _shown(names) if names else "no image"


def _shown(paths: Sequence[Path]) -> str:
    more = ", ..." if len(paths) > SHOWN else ""
    return ", ".join(path.name for path in paths[:SHOWN]) + more
