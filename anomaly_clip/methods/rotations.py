"""Rotated copies of training images, as SubspaceAD and AnomalyDINO fit on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "RegularRotations",
    "has_rotations",
    "in_batches",
    "random_rotations",
    "regular_rotations",
]

RegularRotations = Literal["auto", "informed", "on", "off"]
LARGEST = 345.0
"""Largest random angle in degrees (SubspaceAD)."""
STEP = 45
"""Degrees between the regular angles (AnomalyDINO)."""
TEXTURES = {"MVTecAD": ("carpet", "grid", "leather", "tile", "wood"), "VisA": ()}
"""Categories without rotations in AnomalyDINO's "agnostic" setting: textures."""
INFORMED = {"MVTecAD": ("hazelnut", "screw"), "VisA": ()}
"""Categories with rotations in its "informed" setting: objects that lie in any direction."""


def has_rotations(rotations: RegularRotations, dataset: str | None, category: str) -> bool:
    """Return whether AnomalyDINO's memory has rotated copies of the images of a category.

    Args:
        rotations: on, off, auto (the published "agnostic" setting: all objects of MVTec-AD and
            VisA), or informed (hazelnut and screw of MVTec-AD).
        dataset: Name of the data set; None if unknown.
        category: The category.
    """
    name = dataset or ""
    if rotations == "informed":
        return category in INFORMED.get(name, ())
    if rotations == "auto":
        return name in TEXTURES and category not in TEXTURES[name]
    return rotations == "on"


def in_batches(copies: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield images ``(batch_size, 3, H, W)``, or fewer at the end, from copies of several images.

    Args:
        copies: Copies ``(n, 3, H, W)`` of each image.
        batch_size: Number of copies in a batch.
    """
    waiting: list[Tensor] = []
    for of_image in copies:
        waiting += of_image
        while len(waiting) >= batch_size:
            yield torch.stack(waiting[:batch_size])
            del waiting[:batch_size]
    if waiting:
        yield torch.stack(waiting)


def random_rotations(image: Tensor, count: int, seed: int, index: int) -> Tensor:
    """Return copies ``(count, 3, H, W)`` of an image, rotated about its centre by random angles.

    As in SubspaceAD, the angles are uniform from 0 to 345 degrees, pixels are those of the nearest
    neighbour, and corners without a pixel are black.

    Args:
        image: uint8 ``(3, H, W)``.
        count: Number of copies, 1 or more.
        seed: Seed of the run.
        index: Index of the image, so that its angles do not depend on other images.
    """
    angles = np.random.default_rng([seed, index]).uniform(0, LARGEST, count)
    original = Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
    copies = [np.asarray(original.rotate(float(angle))) for angle in angles]
    return torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2).to(image.device)


def regular_rotations(image: Tensor) -> Tensor:
    """Return copies ``(8, 3, H, W)`` of an image, rotated by 0, 45, ..., 315 degrees.

    As in AnomalyDINO, pixels are interpolated bilinearly, and corners are filled by reflection at
    the border, which does not repeat the edge pixel.

    Args:
        image: uint8 ``(3, H, W)``.
    """
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    height, width = pixels.shape[:2]
    copies = []
    for angle in range(0, 360, STEP):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
        copies.append(
            cv2.warpAffine(
                pixels,
                matrix,
                (width, height),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REFLECT_101,
            )
        )
    return torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2).to(image.device)
