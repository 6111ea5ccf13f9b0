"""Small data sets of the contract: generated images in MVTec-AD's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.demo.surfaces import fitting_defects

__all__ = ["NAMES", "SIDE", "write_images"]

NAMES = ("oak", "red_fabric")
"""Categories of the images."""
SIDE = 72
"""Side of an image in pixels; not that of any backbone, so that images are resized."""


def write_images(
    root: Path, names: Sequence[str] = NAMES, num_train: int = 6, num_test: int = 3
) -> Path:
    """Write categories in MVTec-AD's layout and return their folder.

    Args:
        root: The folder.
        names: The categories, from those of the data set ``Demo``.
        num_train: Number of normal training images per category.
        num_test: Number of normal, and of defective, test images per category.
    """
    for name in names:
        defect = fitting_defects(CATEGORIES[name])[0]
        splits = (("train", None, num_train), ("test", None, num_test), ("test", defect, num_test))
        for number, (split, kind, count) in enumerate(splits):
            for index in range(count):
                photograph = draw_photograph(name, number, index, kind, SIDE)
                file = root / name / split / (kind or "good") / f"{index:03d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photograph.image).save(file)
                if kind is not None:
                    mask = root / name / "ground_truth" / kind / f"{index:03d}_mask.png"
                    mask.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(255 * photograph.mask.astype(np.uint8)).save(mask)
    return root
