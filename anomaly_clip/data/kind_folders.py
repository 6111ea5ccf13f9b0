"""Data sets with a folder per kind of image: optional masks, and images in deeper folders."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path

from anomaly_clip.data.dataset import AnomalyData, Split
from anomaly_clip.data.folder_forms import NORMAL_FOLDERS
from anomaly_clip.folders import FolderTree, images_in, subfolders

__all__ = ["KindFolders", "images_in_subfolders", "is_normal"]


def is_normal(folder: Path) -> bool:
    """Return whether a folder has the name of normal images."""
    return folder.name.lower() in NORMAL_FOLDERS


def images_in_subfolders(folder: Path) -> list[Path]:
    """Return the images in all folders below a folder, also through links, but not its own."""
    inner = subfolders(folder)
    if not inner:
        return []
    below = FolderTree(folder).below(inner)
    return [image for folders in below.values() for f in folders for image in images_in(f)]


class KindFolders(AnomalyData):
    """A data set in a layout like MVTec-AD's: images are in folders such as ``train/good``.

    Masks are optional: without any, there are image metrics only. If there are some, every
    defective image must have one. Images in subfolders of the kinds are not used, but counted.
    """

    @cached_property
    def has_masks(self) -> bool:
        """True if defective images of some category in use have masks."""
        folders = [f for name in self.categories for f in self.mask_folders(name)]
        return any(images_in(f) for f in folders if not is_normal(f))

    @abstractmethod
    def kind_folders(self, category: str, split: Split) -> list[Path]:
        """Return the folders whose images are listed, and whose subfolders are not."""

    def left_out(self, stage: str) -> dict[str, list[Path]]:
        """Return the images in subfolders of the kinds of the stage's split."""
        split: Split = "train" if stage == "fit" else "test"
        if split not in self.splits or (split == "train" and self.auxiliary is not None):
            return {}
        places: dict[str, None] = {}
        images = []
        for category in self.train_categories if split == "train" else self.categories:
            for folder in self.kind_folders(category, split):
                inner = images_in_subfolders(folder)
                if inner:
                    places[f"{folder.relative_to(self.root / category).as_posix()}/"] = None
                    images += inner
        first, *others = places or [""]
        more = (
            f" and {len(others)} more" if len(others) > 1 else "".join(f" and {o}" for o in others)
        )
        return {f"image in subfolders of {first}{more}": images}
