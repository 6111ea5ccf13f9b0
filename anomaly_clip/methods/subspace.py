"""SubspaceAD's mathematics: subspace of normal patches, distances, maps and image scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone
from anomaly_clip.errors import check_between, check_choice
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.methods.gaussians import Moments

__all__ = [
    "DISTANCES",
    "Combination",
    "Distance",
    "Subspace",
    "check_subspace",
    "official_blocks",
    "patch_features",
    "principal_subspace",
    "smoothed_maps",
    "top_mean",
]

Distance = Literal["reconstruction", "mahalanobis", "euclidean", "cosine"]
DISTANCES = get_args(Distance)
Combination = Literal["mean", "concat"]
BLUR_SIGMA, BLUR_TRUNCATE = 4.0, 0.25
"""A Gaussian of 3 x 3 pixels, which is nearly their mean."""
OFFICIAL_BLOCKS = {12: [8, 9], 24: [14, 15, 16, 17, 18], 40: [23, 24, 25, 26, 27, 28, 29]}
"""Blocks of the official settings, by the number of blocks of the tower."""
TOLERANCE = 1e-10
"""Share of the variance that counts as rounding: fewer patches than channels have no more."""


class Subspace(NamedTuple):
    """Mean of patches, and the principal components that explain most of their variance."""

    mean: Tensor
    """``(C,)``."""
    components: Tensor
    """``(C, K)``, orthonormal columns."""
    eigenvalues: Tensor
    """``(K,)``, variance along each component, descending."""

    def distances(self, patches: Tensor, distance: Distance = "reconstruction") -> Tensor:
        """Return the distances ``(...)`` of patches ``(..., C)``.

        ``reconstruction``: squared distance from the subspace (the paper). ``mahalanobis`` and
        ``euclidean``: squared distance from the mean within the subspace, with and without
        division by the variances. ``cosine``: 1 minus the cosine of a patch and its projection.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)  # half with bf16-true
        patches = patches.to(dtype)
        mean, components, eigenvalues = (part.to(dtype) for part in self)
        centred = patches - mean
        inside = centred @ components  # (..., K)
        if distance == "mahalanobis":
            return (inside.square() / (eigenvalues + 1e-6)).sum(dim=-1)
        if distance == "euclidean":
            return inside.square().sum(dim=-1)
        projected = inside @ components.mT
        if distance == "cosine":
            return 1 - F.cosine_similarity(patches, projected + mean, -1)
        return (centred - projected).square().sum(dim=-1)


def principal_subspace(moments: Moments, explained: float) -> Subspace:
    """Return the smallest subspace that explains a share of the variance, in float64.

    Directions without variance are left out, also if all of it shall be explained (our choice: the
    official code may keep them, and any patch then has distance 0). Equal patches have no
    component, and distances from their mean.

    Args:
        moments: Mean ``(1, C)`` and scatter ``(1, C, C)`` of patches.
        explained: Share of the variance, above 0 and at most 1.
    """
    covariance = moments.scatter[0] / max(1, moments.num_images - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    total = variances.sum()
    missing = variances.cumsum(0) < (explained - TOLERANCE) * total
    kept = 0 if total == 0 else min(int(missing.sum()) + 1, len(variances))
    return Subspace(moments.mean[0], vectors[:, :kept], variances[:kept])


def patch_features(
    backbone: AnyBackbone, images: Tensor, layers: Sequence[Any], combine: Combination
) -> Tensor:
    """Return the features ``(B, N, C)`` of all patches in float32: mean of the layers, or all."""
    maps = [part.float() for part in backbone.feature_maps(images, layers)]  # (B, C, h, w)
    if combine == "mean":
        return torch.stack(maps).mean(dim=0).flatten(2).mT
    size = (maps[0].shape[-2], maps[0].shape[-1])
    same = [part if part.shape[-2:] == size else _resized(part, size) for part in maps]
    return torch.cat(same, dim=1).flatten(2).mT


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def check_subspace(
    backbone: AnyBackbone, layers: Sequence[Any], combine: Combination, explained: float
) -> None:
    """Check the options of a subspace.

    Raises:
        ValueError: If the layers have no mean, or the share of the variance is not above 0 and at
            most 1.
    """
    check_choice("model.combine", combine, get_args(Combination))
    check_between("model.explained", explained, 0, 1, open_low=True)
    sizes = {(backbone.channels[layer], backbone.strides[layer]) for layer in layers}
    if combine == "mean" and len(sizes) > 1:
        raise ValueError(
            f"model.layers {list(layers)} have different sizes, so they have no mean: set "
            f"model.combine to concat, or choose one of them"
        )


def official_blocks(num_blocks: int) -> list[int] | list[str]:
    """Return the blocks of the official settings, or else the last one of the third quarter."""
    return OFFICIAL_BLOCKS.get(num_blocks) or ["layer3"]


def smoothed_maps(patch_maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps ``(B, *size)`` of patch distances ``(B, h, w)``, smoothed a little."""
    maps = resize_maps(patch_maps, size)
    return gaussian_blur(maps, BLUR_SIGMA, truncate=BLUR_TRUNCATE, border="inner")


def top_mean(scores: Tensor, share: float = 0.01) -> Tensor:
    """Return the mean ``(B,)`` of the highest ``int(share * n)`` scores of ``(B, n)``, at least 1.

    Rounding down is that of the official code, unlike that of ``maps.image_score``.
    """
    return scores.topk(max(1, int(share * scores.shape[1])), dim=1).values.mean(dim=1)
