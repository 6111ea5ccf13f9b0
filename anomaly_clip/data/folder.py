"""``ImageFolder``: a user's own pictures of one thing, with or without labels and masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.layout import images_in, missing_layout, paired_masks, subfolders

__all__ = ["ImageFolder", "list_folder"]

NORMAL = "good"
MASKS = "ground_truth"
LAYOUT = f"images, or {NORMAL}/ and a folder a kind of defect (masks in {MASKS}/<defect>/)"


def is_labelled(root: Path) -> bool:
    """Whether a folder ``good`` says which pictures are normal."""
    return (root / NORMAL).is_dir()


def list_folder(root: Path, category: str) -> Iterator[Sample]:
    """Yield a user's pictures, sorted by path.

    With a folder ``good`` every other folder is a kind of defect; the mask of ``<defect>/NAME.*``
    is ``ground_truth/<defect>/NAME_mask.*`` or ``NAME.*``, and either all defects have masks or
    none has. Without it, all pictures here and below are taken, and nothing is known of them.

    Raises:
        FileNotFoundError: If there is no picture.
    """
    if not is_labelled(root):
        images = sorted(p for p in _walk(root) if MASKS not in p.relative_to(root).parts)
        if not images:
            raise missing_layout(root, LAYOUT)
        for image in images:
            where = image.parent.relative_to(root).as_posix()
            yield Sample(image, category, label=False, defect="" if where == "." else where)
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
    for below in subfolders(folder):
        if not below.is_symlink():  # which may lead back up
            yield from _walk(below)


class ImageFolder(AnomalyData):
    """A user's own pictures of one thing, named in words; no training data needed.

    Either a folder of images, for ``predict``; or ``good/`` and one folder a kind of defect, with
    or without masks in ``ground_truth/<defect>/``, for ``test`` too.

    Args:
        root: The folder.
        category: Words for what the pictures show, such as "laser-cut plank".
        shared: Arguments of all data modules but ``categories``.
    """

    dataset_name: ClassVar[str] = "ImageFolder"
    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def __init__(self, root: str, category: str, **shared: Any) -> None:
        super().__init__(root=root, categories=None, **shared)
        if not category.strip():
            raise ValueError('data.category is empty: say what is shown, such as "laser-cut plank"')
        self.category = category

    @property
    def has_masks(self) -> bool:
        """Whether there are pixel labels."""
        return self.has_labels and (self.root / MASKS).is_dir()

    @property
    def has_labels(self) -> bool:
        """Whether a folder ``good`` says which pictures are normal."""
        return is_labelled(self.root)

    def find_categories(self) -> list[str]:
        """Return the one category.

        Raises:
            FileNotFoundError: If the folder is not there.
        """
        if not self.root.is_dir():
            raise missing_layout(self.root, LAYOUT)
        return [self.category]

    def mask_folders(self, category: str) -> list[Path]:
        """Return the folders that hold nothing but masks."""
        return subfolders(self.root / MASKS) if self.has_labels else []

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_folder`; there is no training split."""
        return list_folder(self.root, category)
