"""Folders of masks next to images: recognised by their names, file names and contents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.layout import images_in, subfolders
from anomaly_clip.images import evenly_spaced, read_image

__all__ = ["LABEL_FOLDERS", "MASK_FOLDERS", "MaskFolders", "looks_like_a_mask"]

MASK_FOLDERS = ("ground_truth", "groundtruth", "masks", "mask", "gt")
"""Names of folders that contain masks and nothing else, in lower case."""
LABEL_FOLDERS = (
    "label",
    "labels",
    "annotation",
    "annotations",
    "segmentation",
    "segmentations",
    "seg",
)
"""Names of folders that contain masks, or photographs of a defect of this name."""
OF_ONE_KIND = re.compile(
    r"(?:(?:masks?|gt|ground_?truth|labels?)[ _-](?P<last>.+)"
    r"|(?P<first>.+)[ _-](?:masks?|gt|ground_?truth|labels?))"
)
"""Names of mask folders of one kind of defect, such as ``bad_mask``."""

EXTREME = 8  # grey levels from black or white that still count as black or white
BLACK_AND_WHITE = 0.99  # fraction of such pixels in a mask, whose edges may be antialiased
NEARLY_EXTREME = 32  # the same for masks saved as JPEG, in folders with a name of masks
NEARLY_BLACK_AND_WHITE = 0.9
PHOTOGRAPH = 0.5  # fraction of such pixels below which an image is a photograph
NUM_COLOURS = 32  # grey levels that a photograph has at least; masks of classes have fewer
INSPECTED = 3  # images that are read of a folder with a name of masks


class MaskFolders:
    """Recognition of mask folders.

    Args:
        endings: Endings that the name of a mask may have after that of its image.
    """

    def __init__(self, endings: Sequence[str]) -> None:
        self.endings = endings

    def are_masks(self, folder: Path, names: set[str]) -> bool:
        """Return whether a folder with the name of a mask folder contains masks.

        Args:
            folder: The folder, with or without subfolders.
            names: Names of images without extension, which masks are expected to have.
        """
        images = _images_of(folder)
        inspected = _some(images)
        if not images or all(map(_looks_like_a_photograph, inspected)):
            return False
        like_masks = sum(map(_looks_nearly_like_a_mask, inspected))
        return self._are_named(images, names) or 2 * like_masks > len(inspected)

    def are_labels(self, folder: Path, names: set[str], kinds: Sequence[str] = ()) -> bool:
        """Return whether a folder called ``labels``, or after a kind of defect, contains masks.

        Args:
            folder: The folder, with or without subfolders.
            names: Names of images without extension, which masks must have.
            kinds: Kinds of defects.
        """
        if folder.name.lower() not in LABEL_FOLDERS and not self.kind_of(folder, kinds):
            return False
        images = _images_of(folder)
        named = bool(images) and self._are_named(images, names)
        return named and all(map(_looks_nearly_like_a_mask, _some(images)))

    def are_certain(self, folder: Path, names: set[str], partners: Sequence[Path]) -> bool:
        """Return whether a folder of any name certainly contains masks.

        All its images are black and white and have the names of others, those with white have the
        names of defective ones, and these are not black and white themselves.

        Args:
            folder: The folder, with or without subfolders.
            names: Names of all other images, without extension.
            partners: Defective images of other folders.
        """
        images = _images_of(folder)
        if not (images and self._are_named(images, names) and all(map(looks_like_a_mask, images))):
            return False
        defective: dict[str, list[Path]] = {}
        for partner in partners:
            defective.setdefault(partner.stem.lower(), []).append(partner)
        filled = [image for image in images if _has_white(image)]
        if not filled or not self._are_named(filled, set(defective)):
            return False
        names_of_filled = [name for image in filled for name in self._names_of(image)]
        paired = [partner for name in names_of_filled for partner in defective.get(name, [])]
        return not any(map(looks_like_a_mask, _some(paired)))

    def kind_of(self, folder: Path, kinds: Iterable[str]) -> str | None:
        """Return the kind of defect that a folder such as ``bad_mask`` is named after, if any."""
        match = OF_ONE_KIND.fullmatch(folder.name.lower())
        name = match and (match["first"] or match["last"])
        return next((kind for kind in kinds if kind.lower() == name), None)

    def _names_of(self, mask: Path) -> list[str]:
        """Return the names, in lower case, that the image of a mask may have."""
        stem = mask.stem.lower()
        endings = [ending.lower() for ending in self.endings]
        return [stem[: len(stem) - len(e)] for e in endings if stem.endswith(e)]

    def _are_named(self, masks: Sequence[Path], names: set[str]) -> bool:
        lower = {name.lower() for name in names}
        return all(any(name in lower for name in self._names_of(mask)) for mask in masks)


def looks_like_a_mask(image: Path) -> bool:
    """Return whether nearly all pixels of an image are black or white; False if unreadable."""
    return _extreme_share(_pixels(image), EXTREME) >= BLACK_AND_WHITE


def _looks_nearly_like_a_mask(image: Path) -> bool:
    return _extreme_share(_pixels(image), NEARLY_EXTREME) >= NEARLY_BLACK_AND_WHITE


def _looks_like_a_photograph(image: Path) -> bool:
    pixels = _pixels(image)
    if pixels is None or _extreme_share(pixels, NEARLY_EXTREME) >= PHOTOGRAPH:
        return False
    return len(np.unique(pixels[..., 1])) >= NUM_COLOURS


def _has_white(image: Path) -> bool:
    pixels = _pixels(image)
    return pixels is not None and bool((pixels >= 255 - EXTREME).any())


def _extreme_share(pixels: NDArray[np.uint8] | None, distance: int) -> float:
    """Return the fraction of values near black or white; 0 for an unreadable image."""
    if pixels is None:
        return 0.0
    return float(((pixels <= distance) | (pixels >= 255 - distance)).mean())


def _pixels(image: Path) -> NDArray[np.uint8] | None:
    """Return an image ``(H, W, 3)``; None if it is unreadable."""
    try:
        return read_image(image)
    except (OSError, ValueError):
        return None


def _some(images: Sequence[Path]) -> list[Path]:
    return [images[place] for place in evenly_spaced(INSPECTED, len(images))]


def _images_of(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders."""
    return [*images_in(folder), *(i for f in subfolders(folder) for i in images_in(f))]
