"""The images that MuSc compares: their grids, their order, and those of earlier calls."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.methods.image_features import ImageFeatures
from anomaly_clip.methods.mutual_scoring import RecentImages

__all__ = ["Recent", "SeenImages", "drawn_order", "resize_grids"]

Recent = dict[tuple[str, int], RecentImages]
"""Aggregated features of the last images of a sequence, by layer and r."""


class SeenImages(NamedTuple):
    """The last images of a sequence."""

    images: ImageFeatures
    """Class vectors; and the features of the layers, unless aggregated ones are kept."""
    raw: Tensor
    """Maximum of each map, ``(n,)``."""
    recent: Recent | None
    """Aggregated features, which need more memory."""


def resize_grids(grids: Tensor, size: torch.Size) -> Tensor:
    """Resize features ``(n, C, h, w)``: average to a coarser grid, or interpolate (our choice)."""
    if grids.shape[-2:] == size:
        return grids
    if grids.shape[-1] > size[-1]:
        grids = grids.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return F.adaptive_avg_pool2d(grids, (size[0], size[1]))
    return F.interpolate(grids, size, mode="bilinear", align_corners=False)


def drawn_order(n: int, seed: int, category: str) -> Tensor:
    """Return the order in which images are seen, int64 ``(n,)``: random by (seed, category)."""
    digest = hashlib.sha256(f"{seed} {category}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(n, generator=generator)
