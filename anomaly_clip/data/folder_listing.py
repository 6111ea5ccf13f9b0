"""Listing of a user's folder: its folders and images, and a record of what is not used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from anomaly_clip.files import name_key
from anomaly_clip.folders import FolderContent, FolderTree, is_run, scan
from anomaly_clip.image_formats import is_own_drawing

__all__ = ["FolderListing", "joined"]

RESULTS = "folders of results"
DRAWINGS = "drawings of this program"
WITH_EXAMPLE = (
    RESULTS,
    DRAWINGS,
    "pipes",
    "names that begin",
    "links",
    "masks",
    "folders that",
    "other files",
    "files that",
)
"""Beginnings of what is not used, of which an example is given."""


RESULT_FOLDERS = ("maps", "raw_maps", "gallery", "validation", "logs", "checkpoints")
"""Folders of a run, for a run whose folder is that of the photographs."""


class FolderListing:
    """Folders and images below a user's folder; each folder is read once.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unused: dict[str, list[Path]] = {}
        """Paths that are not used, by description."""
        self._tree = FolderTree(root, self.content)
        self._contents: dict[Path, FolderContent] = {}
        self._by_stem: dict[Path, dict[str, Path]] = {}

    def content(self, folder: Path) -> FolderContent:
        """Return the content of a folder, read once."""
        if folder not in self._contents:
            content = scan(folder)
            drawn = [image for image in content.images if is_own_drawing(image)]
            self.leave_out(DRAWINGS, drawn)
            kept = [image for image in content.images if image not in drawn]
            self._contents[folder] = content._replace(images=kept)
        return self._contents[folder]

    def images(self, folder: Path) -> list[Path]:
        """Return the images of a folder, among them links that lead to no file, sorted."""
        content = self.content(folder)
        return sorted([*content.images, *content.missing])

    def named(self, folder: Path, stem: str) -> Path | None:
        """Return the image of a folder with a name without suffix, else one in another case."""
        if folder not in self._by_stem:
            images = {name_key(image.stem): image for image in reversed(self.images(folder))}
            lower = {name.lower(): image for name, image in reversed(images.items())}
            self._by_stem[folder] = lower | images
        by_stem, key = self._by_stem[folder], name_key(stem)
        return by_stem.get(key) or by_stem.get(key.lower())

    def subfolders(self, folder: Path) -> list[Path]:
        """Return the subfolders without those of runs, whose images this package drew itself."""
        return [f for f in self.content(folder).folders if self._is_no_run(f)]

    def below(
        self, folders: Sequence[Path], enters: Callable[[Path], bool] = lambda folder: True
    ) -> dict[Path, list[Path]]:
        """Return each folder with itself and the folders below it; see :class:`FolderTree`."""
        return self._tree.below(folders, lambda f: self._is_no_run(f) and enters(f))

    def trees(self, folders: Sequence[Path]) -> list[Path]:
        """Return folders and all folders below them, whether or not :meth:`below` lists them."""
        below = FolderTree(self.root, self.content).below(folders)
        return [inner for listed in below.values() for inner in listed]

    def tree_images(self, folder: Path) -> list[Path]:
        """Return the images of a folder and of all folders below it."""
        return [image for inner in self.trees([folder]) for image in self.images(inner)]

    def images_below(self, folders: Sequence[Path]) -> list[Path]:
        """Return all images of folders that are not used, of those not listed so far."""
        below = self._tree.copy().below(folders, lambda f: not is_run(f))
        return [image for inner in below.values() for f in inner for image in self.images(f)]

    def place(self, path: Path) -> str:
        """Return a path relative to the root, with slashes."""
        return path.relative_to(self.root).as_posix()

    def leave_out(self, what: str, paths: Sequence[Path]) -> None:
        """Record that paths are not used."""
        if paths:
            self.unused.setdefault(what, []).extend(paths)

    def remarks(self) -> list[str]:
        """Return what is not used, to be shown to the user."""
        for content in self._contents.values():
            self.leave_out("pipes or the like with names of images", content.irregular)
            self.leave_out("names that begin with @, $ or __", content.passed_over)
            self.leave_out("files that are not images", content.others)
        self.leave_out(
            "links to folders that are read elsewhere or contain the link", self._tree.repeated
        )
        self.leave_out("folders that cannot be read", self._tree.closed)
        remarks = []
        for what, paths in self.unused.items():
            example = f", such as {self.place(min(paths))}" if what.startswith(WITH_EXAMPLE) else ""
            remarks.append(f"not used: {what}{example} ({len(paths)})")
        return remarks

    def _is_no_run(self, folder: Path) -> bool:
        inner = is_run(folder.parent) and folder.name in RESULT_FOLDERS
        if folder == self.root or not (is_run(folder) or inner):
            return True
        if folder not in self.unused.get(RESULTS, []):
            self.leave_out(RESULTS, [folder])
        return False


def joined(names: Sequence[str]) -> str:
    """Return names as a text, such as ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
