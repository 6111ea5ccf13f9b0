"""AnomalyDINO's mathematics: cosine distances of patches from their nearest normal patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone

__all__ = ["batched_distances", "check_one_layer", "cosine_distances", "last_patches"]

AT_ONCE = 1 << 24
"""Cosines computed at once, 64 MiB in float32."""


def check_one_layer(layers: Sequence[Any], method: str) -> None:
    """Check that patches are those of one layer.

    Raises:
        ValueError: If there are several.
    """
    if len(layers) != 1:
        raise ValueError(f"model.layers {layers}: {method} compares patches of one layer; give one")


def last_patches(backbone: AnyBackbone, images: Tensor, layers: Sequence[Any]) -> Tensor:
    """Return the patches ``(B, N, C)`` of a layer after the final norm, in float32."""
    (maps,) = backbone.feature_maps(images, layers, norm=True)
    return maps.flatten(2).mT.float()


def cosine_distances(patches: Tensor, bank: Tensor, num_neighbours: int = 1) -> Tensor:
    """Return the mean cosine distance ``(B, N)`` of patches from their nearest rows.

    Args:
        patches: ``(B, N, C)``, of unit length.
        bank: ``(M, C)``, of unit length.
        num_neighbours: Number of rows whose distances are averaged; all of a smaller bank.
    """
    flat = patches.flatten(0, 1)
    count = min(num_neighbours, len(bank))
    # The number of patches is unknown while a graph is traced.
    compiling = torch.compiler.is_compiling()
    blocks = [flat] if compiling else flat.split(max(1, AT_ONCE // len(bank)))
    parts = [1 - (block @ bank.mT).topk(count, dim=1).values.mean(dim=1) for block in blocks]
    return torch.cat(parts).view(patches.shape[:2])


def batched_distances(patches: Tensor, row: int, quantile: float) -> Tensor:
    """Return the mean cosine distance ``(N,)`` of an image's patches from the nearest of others.

    With M patches of all other images and k = int(quantile M), the ``max(1, k - 1)`` smallest
    distances are averaged (our choice). The official code averages those strictly below the k-th
    smallest: the same, unless k is below 2, where it returns NaN, or distances are equal.

    Args:
        patches: ``(n, N, C)``, of unit length, of at least two images.
        row: The image.
        quantile: Share of the distances.
    """
    num_images, num_patches = patches.shape[:2]
    others = patches.flatten(0, 1)
    count = max(1, int(quantile * (num_images - 1) * num_patches) - 1)
    start = row * num_patches
    parts = []
    for block in patches[row].split(max(1, AT_ONCE // len(others))):
        cosines = block @ others.mT
        cosines[:, start : start + num_patches] = -torch.inf  # the image itself
        parts.append(1 - cosines.topk(count, dim=1).values.mean(dim=1))
    return torch.cat(parts)
