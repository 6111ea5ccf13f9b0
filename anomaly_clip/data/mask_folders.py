"""Folders of masks next to images: recognised by their names, file names and contents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from anomaly_clip.data.mask_content import (
    has_two_values,
    has_white,
    is_two_valued,
    looks_like_a_mask,
    looks_like_a_photograph,
    looks_nearly_like_a_mask,
)
from anomaly_clip.files import name_key
from anomaly_clip.images import evenly_spaced

__all__ = [
    "LABEL_FOLDERS",
    "MASK_FOLDERS",
    "ImageNames",
    "MaskFolders",
    "has_name_of_masks",
    "masks_among_defects",
]

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

INSPECTED = 3  # images that are read of a folder with a name of masks


class ImageNames:
    """Images by their names without extension, in any case and any form of accents.

    Args:
        images: The images.
    """

    def __init__(self, images: Iterable[Path]) -> None:
        self._images: dict[str, list[Path]] = {}
        for image in images:
            self._images.setdefault(_stem_key(image), []).append(image)

    def outside(self, folders: set[Path], names: Iterable[str]) -> Iterator[Path]:
        """Yield the images with one of the names that are not in one of the folders."""
        images = (image for name in names for image in self._images.get(name, []))
        return (image for image in images if image.parent not in folders)


class MaskFolders:
    """Recognition of mask folders.

    Args:
        endings: Endings that the name of a mask may have after that of its image.
        images_below: Returns the images of a folder and of the folders below it.
    """

    def __init__(
        self, endings: Sequence[str], images_below: Callable[[Path], Sequence[Path]]
    ) -> None:
        self.endings = [name_key(ending).lower() for ending in endings]
        self.images_below = images_below

    def are_masks(self, folder: Path, others: ImageNames) -> bool:
        """Return whether a folder with the name of a mask folder contains masks.

        Args:
            folder: The folder, with or without folders below it.
            others: Images whose names masks are expected to have, of this and other folders.
        """
        images = self.images_below(folder)
        inspected = _some(images)
        if not images or all(map(looks_like_a_photograph, inspected)):
            return False
        like_masks = sum(map(looks_nearly_like_a_mask, inspected))
        return self._are_named(images, others) or 2 * like_masks > len(inspected)

    def are_labels(self, folder: Path, others: ImageNames, kinds: Sequence[str] = ()) -> bool:
        """Return whether a folder called ``labels``, or after a kind of defect, contains masks.

        Args:
            folder: The folder, with or without folders below it.
            others: Images whose names masks must have, of this and other folders.
            kinds: Kinds of defects.
        """
        if folder.name.lower() not in LABEL_FOLDERS and not self.kind_of(folder, kinds):
            return False
        images = self.images_below(folder)
        named = bool(images) and self._are_named(images, others)
        return named and all(map(looks_nearly_like_a_mask, _some(images)))

    def are_certain(self, folder: Path, others: ImageNames, defective: ImageNames) -> bool:
        """Return whether a folder of any name certainly contains masks.

        All its images are black and white and have the names of others, those with white have the
        names of defective ones, and these are not black and white themselves.

        Args:
            folder: The folder, with or without folders below it.
            others: All images, of this and other folders.
            defective: Defective images, of this and other folders.
        """
        images = self.images_below(folder)
        if not (
            images and self._are_named(images, others) and all(map(_is_black_and_white, images))
        ):
            return False
        filled = [image for image in images if has_white(image)]
        if not filled or not self._are_named(filled, defective):
            return False
        inside = {image.parent for image in images}
        names_of_filled = [name for image in filled for name in self._names_of(image)]
        partners = list(defective.outside(inside, names_of_filled))
        return not any(map(_is_black_and_white, _some(partners)))

    def refuse_masks(self, folder: Path, others: ImageNames) -> None:
        """Refuse a folder of images that are masks by their two values and names.

        Photographs against a light have more values, and are accepted.

        Args:
            folder: A folder that is not taken for one of masks.
            others: All images, of this and other folders.

        Raises:
            ValueError: If its images are masks of images that are no masks themselves.
        """
        images = self.images_below(folder)
        if not (images and self._are_named(images, others)):
            return
        if not all(map(is_two_valued, _some(images))) or not all(map(is_two_valued, images)):
            return
        inside = {image.parent for image in images}
        names = [name for image in images for name in self._names_of(image)]
        if any(map(has_two_values, _some(list(others.outside(inside, names))))):
            return
        if any(map(has_white, images)):
            raise ValueError(masks_among_defects(folder))

    def seem_masks(self, images: Sequence[Path]) -> bool:
        """Return whether some of the images, evenly spaced, are nearly of two values each."""
        return bool(images) and all(map(has_two_values, _some(images)))

    def are_named(self, masks: Sequence[Path], others: ImageNames) -> bool:
        """Return whether each mask has the name of an image in another folder."""
        return bool(masks) and self._are_named(masks, others)

    def kind_of(self, folder: Path, kinds: Iterable[str]) -> str | None:
        """Return the kind of defect that a folder such as ``bad_mask`` is named after, if any."""
        match = OF_ONE_KIND.fullmatch(name_key(folder.name).lower())
        name = match and (match["first"] or match["last"])
        return next((kind for kind in kinds if name_key(kind).lower() == name), None)

    def _names_of(self, mask: Path) -> list[str]:
        """Return the names, in lower case, that the image of a mask may have."""
        stem = _stem_key(mask)
        return [stem[: len(stem) - len(e)] for e in self.endings if stem.endswith(e)]

    def _are_named(self, masks: Sequence[Path], others: ImageNames) -> bool:
        """Return whether each mask has the name of an image that is not in its own tree."""
        inside = {mask.parent for mask in masks}
        names = {tuple(self._names_of(mask)) for mask in masks}
        return all(any(True for _ in others.outside(inside, stems)) for stems in names)


def masks_among_defects(folder: Path) -> str:
    """Return the message about a folder of masks among those of defects."""
    return (
        f"{folder}: black-and-white images with the names of others are masks: move them to "
        f"ground_truth/<defect>/, or rename the images if they are photographs"
    )


def has_name_of_masks(folder: Path) -> bool:
    """Return whether the name of a folder suggests masks, such as ``mask`` or ``cut_gt``."""
    name = name_key(folder.name).lower()
    return name in (*MASK_FOLDERS, *LABEL_FOLDERS) or OF_ONE_KIND.fullmatch(name) is not None


def _is_black_and_white(image: Path) -> bool:
    return looks_like_a_mask(image) or is_two_valued(image)


def _some(images: Sequence[Path]) -> list[Path]:
    return [images[place] for place in evenly_spaced(INSPECTED, len(images))]


def _stem_key(image: Path) -> str:
    return name_key(image.stem).lower()
