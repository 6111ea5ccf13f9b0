"""Scenes for training on the demo data set: the same image without and with a defect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from anomaly_clip.demo.photographs import CATEGORIES, NAME_OF_WORDS, draw_pair
from anomaly_clip.demo.surfaces import FAMILIES, fitting_defects, vary
from anomaly_clip.records import Draw

__all__ = ["ScenePair", "Scenes", "crop_and_turn"]

FIRST_INDEX = 1_000_000_000
"""Number of the first scene; all listed images have lower numbers."""

ZOOM = 1.35  # maximum magnification; 1 shows the whole image
WHOLE = 0.35  # fraction of the scenes that are not cropped
VARIED = 0.85  # fraction of the scenes whose product varies from the category's usual look


OBJECT_WEIGHT = 2.0  # sampling weight of object categories, which are harder; surfaces have 1


class ScenePair(TypedDict):
    """One scene, before batching; see :class:`~anomaly_clip.records.Batch`."""

    image: Tensor
    synthetic: Tensor
    synthetic_mask: Tensor
    label: bool
    category: str
    path: str
    index: int
    defect: str


class Scenes(Dataset[ScenePair]):
    """Scenes of several categories, each without and with a defect; new ones each epoch.

    Most scenes vary the look of the category, so that methods also learn other colours and sizes.

    Args:
        categories: The categories, by their names in prompts. Each scene shows one category;
            object categories are sampled more often than surface categories.
        length: Number of scenes per epoch.
        seed: Seed of the scenes.
        picture_size: Side of the generated images before resizing, in pixels.
        image_size: Side of the images returned, in pixels.
        held_out_defects: Kinds of defect that are never shown.

    Raises:
        ValueError: If every kind of defect of a category is held out.
    """

    def __init__(
        self,
        categories: Sequence[str],
        length: int,
        seed: int,
        picture_size: int,
        image_size: int,
        held_out_defects: Sequence[str] = (),
    ) -> None:
        self.defects: dict[str, list[str]] = {}
        for words in categories:
            fitting = fitting_defects(CATEGORIES[NAME_OF_WORDS[words]])
            self.defects[words] = [name for name in fitting if name not in held_out_defects]
            if not self.defects[words]:
                raise ValueError(
                    f"data.held_out_defects ({', '.join(held_out_defects)}) leaves {words!r} "
                    f"without any defect: remove one of {', '.join(fitting)}"
                )
        families = [FAMILIES[CATEGORIES[NAME_OF_WORDS[words]].family] for words in self.defects]
        weights = np.array([OBJECT_WEIGHT if family.is_object else 1.0 for family in families])
        self.shares = weights / weights.sum()
        self.length = length
        self.seed = seed
        self.picture_size = picture_size
        self.image_size = image_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: Draw) -> ScenePair:
        rng = np.random.default_rng([self.seed, *draw])
        category = str(rng.choice(list(self.defects), p=self.shares))
        defect = str(rng.choice(self.defects[category]))
        number = FIRST_INDEX + draw.epoch * self.length + draw.index
        look = CATEGORIES[NAME_OF_WORDS[category]]
        if rng.random() < VARIED:
            look = vary(look, rng)
        normal, defective = draw_pair(
            NAME_OF_WORDS[category], self.seed, number, defect, self.picture_size, look
        )
        image, synthetic, mask = crop_and_turn(
            normal.image, defective.image, defective.mask, self.image_size, rng
        )
        return ScenePair(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            synthetic=torch.from_numpy(synthetic).permute(2, 0, 1).contiguous(),
            synthetic_mask=torch.from_numpy(mask),
            label=False,
            category=category,
            path=f"demo-{self.seed}/{category}/scenes/{number}.png",
            index=draw.index,
            defect=defect,
        )


def crop_and_turn(
    normal: NDArray[np.uint8],
    defective: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    size: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """Crop, resize, mirror, rotate and recolour a pair of images, and transform their mask alike.

    The crop contains at least one pixel of the mask. In half of the scenes the colour channels are
    permuted, so that no category has a characteristic colour.

    Args:
        normal: The normal image, ``(S, S, 3)``.
        defective: The same image with a defect, ``(S, S, 3)``.
        mask: The defect's mask, ``(S, S)``.
        size: Side of the returned images and mask, in pixels.
        rng: Random generator for all choices.

    Returns:
        Both images ``(size, size, 3)`` and the mask ``(size, size)``.
    """
    whole = len(mask)
    side = round(whole / rng.uniform(1, ZOOM)) if rng.random() >= WHOLE else whole
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows))
    top, left = (_corner(int(at[chosen]), side, whole, rng) for at in (rows, columns))
    kind = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    mirrored, turns = rng.random() < 0.5, int(rng.integers(4))
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)

    def cut(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
        part = part[top : top + side, left : left + side]
        if side != size:
            part = cv2.resize(part, (size, size), interpolation=kind).astype(np.uint8, copy=False)
        return np.rot90(part[:, ::-1] if mirrored else part, turns)

    share = cut(mask.astype(np.uint8) * 255)
    # Copied because torch does not support negative strides.
    return cut(normal)[..., order].copy(), cut(defective)[..., order].copy(), share > 127


def _corner(inside: int, side: int, whole: int, rng: np.random.Generator) -> int:
    """Sample the start of a crop that contains a given pixel."""
    return int(rng.integers(max(0, inside - side + 1), min(inside, whole - side) + 1))
