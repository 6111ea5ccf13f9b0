"""``ImageFolder``: a user's own images of one object, with or without labels and masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.layout import images_in, missing_layout, paired_masks, subfolders

__all__ = ["ImageFolder", "list_folder"]

NORMAL = "good"
MASKS = "ground_truth"
LAYOUT = f"images, or {NORMAL}/ and one folder per kind of defect (masks in {MASKS}/<defect>/)"


def is_labelled(root: Path) -> bool:
    """Return whether there is a folder ``good``, which holds the normal images."""
    return (root / NORMAL).is_dir()


def list_folder(root: Path, category: str) -> Iterator[Sample]:
    """Yield a user's images, sorted by path.

    If there is a folder ``good``, every other folder is a kind of defect. The mask of
    ``<defect>/NAME.*`` is ``NAME_mask.*`` or ``NAME.*`` in ``ground_truth/<defect>/``; either all
    defective images have masks, or none. If there is no folder ``good``, all images in the folder
    and its subfolders are listed without labels.

    Raises:
        FileNotFoundError: If there is neither a folder ``good`` nor any image.
    """
    if not is_labelled(root):
        images = sorted(p for p in _walk(root) if MASKS not in p.relative_to(root).parts)
        if not images:
            raise missing_layout(root, LAYOUT)
        for image in images:
            folder_name = image.parent.relative_to(root).as_posix()
            defect = "" if folder_name == "." else folder_name
            yield Sample(image, category, label=False, defect=defect)
        return
    with_masks = (root / MASKS).is_dir()
    for folder in subfolders(root):
        if folder.name == MASKS:
            continue
        images = images_in(folder)
        normal = folder.name == NORMAL
        masks = (
            paired_masks(images, root / MASKS / folder.name) if with_masks and not normal else {}
        )
        for image in images:
            yield Sample(image, category, not normal, masks.get(image), folder.name)


def _walk(folder: Path) -> Iterator[Path]:
    yield from images_in(folder)
    for subfolder in subfolders(folder):
        if not subfolder.is_symlink():  # a link may lead back to a parent folder
            yield from _walk(subfolder)


class ImageFolder(AnomalyData):
    """A user's own images of one object, with the object's name; no training images are needed.

    ``predict`` only needs a folder of images. ``test`` also needs labels: a folder ``good/`` and
    one folder per kind of defect. Masks in ``ground_truth/<defect>/`` are optional.

    Args:
        root: The folder.
        category: Name of the object in prompts, such as "laser-cut plank".
        shared: Arguments common to all data modules, except ``categories``.
    """

    dataset_name: ClassVar[str] = "ImageFolder"
    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def __init__(self, root: str, category: str, **shared: Any) -> None:
        super().__init__(root=root, categories=None, **shared)
        if not category.strip():
            raise ValueError(
                f"data.category {category!r} is empty: name the object in the images, such as "
                f'"laser-cut plank"'
            )
        self.category = category

    @property
    def has_masks(self) -> bool:
        """True if there are pixel labels."""
        return self.has_labels and (self.root / MASKS).is_dir()

    @property
    def has_labels(self) -> bool:
        """True if there is a folder ``good``, which holds the normal images."""
        return is_labelled(self.root)

    def find_categories(self) -> list[str]:
        """Return the only category.

        Raises:
            FileNotFoundError: If the folder is missing.
        """
        if not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        return [self.category]

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that contain only masks."""
        return subfolders(self.root / MASKS) if self.has_labels else []

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_folder`; there is no training split."""
        return list_folder(self.root, category)
