"""Paths that match a pattern such as ``photos/**/*.JPG``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from anomaly_clip.data.mask_folders import MASK_FOLDERS
from anomaly_clip.folders import FolderTree, images_in, is_passed_over, is_run

__all__ = ["PatternSearch", "leave_out"]

ANY_DEPTH = "**"


class PatternSearch:
    """Search for the paths that match a pattern, without folders that are passed over.

    Args:
        left_out: Record of what is not used, to be extended.
    """

    def __init__(self, left_out: dict[str, list[Path]]) -> None:
        self.left_out = left_out
        self.images: set[Path] = set()

    def paths(self, folder: Path, parts: Sequence[str]) -> list[Path]:
        """Return the paths below a folder that match the parts of a pattern."""
        first, rest = parts[0], parts[1:]
        if first == ANY_DEPTH:
            below = FolderTree(folder).below([folder], lambda f: f == folder or self._enters(f))
            return [p for inner in below[folder] for p in self.paths(inner, rest or ["*"])]
        if not folder.is_dir():
            return []
        names = (name for name in os.listdir(folder) if fnmatch(name, first))
        matches = sorted(folder / name for name in names if self._sees(name, first))
        if rest:
            inner = [f for f in matches if f.is_dir() and (f.name == first or self._enters(f))]
            return [path for f in inner for path in self.paths(f, rest)]
        self.images.update(images_in(folder))
        return [p for p in matches if not p.is_dir() or p.name == first or self._enters(p)]

    def _enters(self, folder: Path) -> bool:
        """Return whether a folder that is not named may contain images, and record it if not."""
        if not os.access(folder, os.R_OK | os.X_OK):
            leave_out(self.left_out, "folders that cannot be read", [folder])
            return False
        if is_run(folder):
            leave_out(self.left_out, "folders of results", [folder])
            return False
        if folder.name.lower() in MASK_FOLDERS:
            leave_out(self.left_out, "folders that have the name of a mask folder", [folder])
            return False
        return True

    @staticmethod
    def _sees(name: str, pattern: str) -> bool:
        return name == pattern or not is_passed_over(name)


def leave_out(left_out: dict[str, list[Path]], what: str, paths: Sequence[Path]) -> None:
    """Record paths that are not used, by their description."""
    if paths:
        listed = left_out.setdefault(what, [])
        listed += [path for path in paths if path not in listed]
