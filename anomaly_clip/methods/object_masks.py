"""Masks of the object by principal components of its patches, as AnomalyDINO computes them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone
from anomaly_clip.errors import check_choice
from anomaly_clip.progress import say

__all__ = [
    "THRESHOLD",
    "MaskShape",
    "Switch",
    "check_masks",
    "fits_threshold",
    "grid_object_mask",
    "has_masks",
    "object_masks",
    "tell_of_threshold",
]

Switch = Literal["auto", "on", "off"]
MaskShape = Literal["column", "grid"]
THRESHOLD = 10.0
"""The published threshold, which belongs to features of ``THRESHOLD_OF``."""
THRESHOLD_OF = "vit_small_patch14_dinov2"
CENTRE = 0.2, 0.8
"""Rows and columns of the central area, as shares of the grid."""
LEAST_IN_CENTRE = 0.35
"""Share of the central area that an object covers at least."""
MASKED = {"MVTecAD": ("capsule", "hazelnut", "pill", "screw", "toothbrush"), "VisA": None}
"""Categories with object masks; None: all."""


def has_masks(masks: Switch, dataset: str | None, category: str) -> bool:
    """Return whether patches outside the object have distance 0.

    Args:
        masks: on, off, or auto: as published, in VisA and in five categories of MVTec-AD; see
            also :func:`fits_threshold`.
        dataset: Name of the data set; None if unknown.
        category: The category.
    """
    if masks != "auto":
        return masks == "on"
    published = MASKED.get(dataset or "", ())
    return published is None or category in published


def check_masks(masks: str, mask_shape: str) -> None:
    """Check the options of the masks.

    Raises:
        ValueError: If a value is no choice.
    """
    check_choice("model.masks", masks, ("auto", "on", "off"))
    check_choice("model.mask_shape", mask_shape, ("column", "grid"))


def fits_threshold(threshold: float, backbone: AnyBackbone) -> bool:
    """Return whether a threshold belongs to the features of a backbone, or was chosen for them."""
    return threshold != THRESHOLD or backbone.settings.name.partition(".")[0] == THRESHOLD_OF


def tell_of_threshold(method: str, masks: Switch, threshold: float, backbone: AnyBackbone) -> None:
    """Log a line about masks if the published threshold does not belong to the backbone.

    Args:
        method: Name of the method, for the message.
        masks: on: masks are used anyway; auto: the category is published with masks, which are
            left out.
        threshold: The threshold.
        backbone: The backbone.
    """
    if masks == "off" or fits_threshold(threshold, backbone):
        return
    name = backbone.settings.name
    effect = "masks may be wrong" if masks == "on" else "objects are not masked"
    say(
        f"{method}: model.mask_threshold {threshold:g} belongs to {THRESHOLD_OF}; with {name}, "
        f"{effect}: choose another threshold, or set model.masks to off"
    )


def object_masks(tokens: Tensor, threshold: float, shape: MaskShape) -> Tensor:
    """Return whether each patch belongs to the object of its image, bool ``(B, N)``.

    Args:
        tokens: Patches ``(B, N, C)`` after the final norm, row by row of a square grid.
        threshold: See :func:`grid_object_mask`.
        shape: See :func:`grid_object_mask`.
    """
    side = round(tokens.shape[1] ** 0.5)
    masks = [grid_object_mask(patches, (side, side), threshold, shape) for patches in tokens]
    return torch.stack(masks)


def grid_object_mask(
    tokens: Tensor, grid: tuple[int, int], threshold: float, shape: MaskShape
) -> Tensor:
    """Return whether each patch of an image belongs to the object, bool ``(N,)``.

    The first principal component of the patches separates the object from the background. Its
    sign is turned if too little of the centre of the image would belong to the object.

    Args:
        tokens: ``(N, C)``, patches after the final norm, row by row. If a value is NaN or infinite,
            all patches belong to the object.
        grid: Rows and columns of the patches.
        threshold: Value of the component above which a patch belongs to the object.
        shape: Arrangement in which the mask is dilated and closed by 3 x 3 patches: one below the
            other (column), as in the official code, or as in the image (grid).
    """
    centred = tokens.double() - tokens.double().mean(dim=0)
    if not centred.isfinite().all():
        return torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    component = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
    component = component * component[component.abs().argmax()].sign()  # scikit-learn's rule
    values = centred @ component
    rows, columns = (slice(*(int(share * n) for share in CENTRE)) for n in grid)
    mask = values > threshold
    if mask.view(grid)[rows, columns].double().mean() <= LEAST_IN_CENTRE:
        mask = -values > threshold
    mask = mask.view(1, 1, *(grid if shape == "grid" else (-1, 1))).double()
    mask = _dilated(_dilated(mask))
    return ~_dilated(1 - mask).bool().flatten()  # closing ends with an erosion


def _dilated(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask, 3, stride=1, padding=1)
