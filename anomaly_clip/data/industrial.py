"""Industrial data sets: MVTec-AD and those in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from anomaly_clip.data.dataset import (
    AnomalyData,
    Sample,
    Split,
    images_in,
    missing_layout,
    paired_masks,
    subfolders,
)

__all__ = ["MVTecAD", "MagneticTile", "list_mvtec", "mvtec_categories"]

MVTEC_LAYOUT = (
    "<category>/train/good/, <category>/test/<defect>/, <category>/ground_truth/<defect>/"
)


def mvtec_categories(root: Path) -> list[str]:
    """Return the folders of ``root`` that have a ``test`` folder, sorted.

    Raises:
        FileNotFoundError: If there is none.
    """
    names = [p.name for p in subfolders(root) if (p / "test").is_dir()]
    if not names:
        expected = f"MVTec-AD's layout, {MVTEC_LAYOUT}"
        if (root / "test").is_dir():
            expected += f" (this looks like one category: try {root.parent})"
        raise missing_layout(root, expected)
    return names


def list_mvtec(root: Path, category: str, split: Split) -> Iterator[Sample]:
    """Yield ``root/category/split/<defect>/NAME.*``, sorted by path; defect ``good`` is normal.

    The mask of ``test/<defect>/NAME.*`` is ``ground_truth/<defect>/NAME_mask.*``: paired by name.

    Raises:
        FileNotFoundError: If an anomalous image has no mask.
        ValueError: If a mask has no image.
    """
    folder = root / category
    for defect in subfolders(folder / split):
        images = images_in(defect)
        normal = defect.name == "good"
        masks = {} if normal else paired_masks(images, folder / "ground_truth" / defect.name)
        for image in images:
            yield Sample(image, category, not normal, masks.get(image), defect.name)


class MVTecAD(AnomalyData):
    """MVTec-AD (Bergmann et al., CVPR 2019): 15 categories, and any data set in its layout."""

    dataset_name: ClassVar[str] = "MVTecAD"

    def find_categories(self) -> list[str]:
        """See :func:`mvtec_categories`."""
        return mvtec_categories(self.root)

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_mvtec`."""
        return list_mvtec(self.root, category, split)


class MagneticTile(AnomalyData):
    """Magnetic tile surface defects (Huang et al.) in MVTec-AD's layout: grey, of many sizes."""

    dataset_name: ClassVar[str] = "MagneticTile"

    def find_categories(self) -> list[str]:
        """See :func:`mvtec_categories`."""
        return mvtec_categories(self.root)

    def list_samples(self, category: str, split: Split) -> Iterator[Sample]:
        """See :func:`list_mvtec`."""
        return list_mvtec(self.root, category, split)
