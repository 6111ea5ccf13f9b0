"""Masks among the test images of a published layout, where they would be scored as images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomaly_clip.data.layout import USUAL_ENDINGS
from anomaly_clip.data.mask_content import has_two_values
from anomaly_clip.data.mask_folders import (
    MASK_FOLDERS,
    ImageNames,
    MaskFolders,
    has_name_of_masks,
    masks_among_defects,
)
from anomaly_clip.files import name_key
from anomaly_clip.folders import images_in
from anomaly_clip.images import evenly_spaced

__all__ = ["refuse_stray_masks"]

INSPECTED = 3  # images next to others that are read
ENDINGS = tuple(filter(None, USUAL_ENDINGS))


def refuse_stray_masks(folders: Sequence[Path]) -> None:
    """Refuse masks in folders of images; only files whose name suggests a mask are read.

    Args:
        folders: The folders of a split, one per kind of image.

    Raises:
        ValueError: If a folder is one of masks, or masks lie next to their images.
    """
    images = {folder: images_in(folder) for folder in folders}
    masks = MaskFolders(USUAL_ENDINGS, images_in)
    suspects = [folder for folder in folders if has_name_of_masks(folder)]
    others = ImageNames(image for listed in images.values() for image in listed)
    for folder in suspects:
        sure = folder.name.lower() in MASK_FOLDERS or masks.are_named(images[folder], others)
        if sure and masks.seem_masks(images[folder]):
            raise ValueError(masks_among_defects(folder))
    for folder, listed in images.items():
        beside = _masks_beside(listed)
        inspected = [beside[place] for place in evenly_spaced(INSPECTED, len(beside))]
        if inspected and all(map(has_two_values, inspected)):
            raise ValueError(
                f"{beside[0]}: a mask next to its image: move it to ground_truth/{folder.name}/, "
                f"or rename it if it is a photograph"
            )


def _masks_beside(images: Sequence[Path]) -> list[Path]:
    """Return the images with the name of another and the ending of a mask."""
    names = {name_key(image.stem).lower(): image for image in images}
    return [
        image
        for name, image in names.items()
        if any(name.endswith(e) and name.removesuffix(e) in names for e in ENDINGS)
    ]
