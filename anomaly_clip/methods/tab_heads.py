"""TAB's heads, which bring image features to the texts' width, and the logits behind them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import unit

__all__ = ["Head", "ProjectionHead", "alignment_logits", "make_head", "mean_cosine"]

Head = Literal["auto", "none", "linear", "projection"]


def make_head(kind: Head, network: tuple[str, int], text: tuple[str, int]) -> nn.Module:
    """Return one side's head.

    Args:
        kind: auto: projection if widths differ, else none.
        network: Name and width of the ResNet.
        text: Name and width of the CLIP.

    Raises:
        ValueError: If widths differ and there is to be no head.
    """
    (name, width), (text_name, dim) = network, text
    if kind == "auto":
        kind = "none" if dim == width else "projection"
    if kind == "none" and dim != width:
        raise ValueError(
            f"model.head none: {name} has {width} channels, {text_name} {dim}: set model.head to "
            f"projection"
        )
    if kind == "projection":
        return ProjectionHead(width, dim)
    return nn.Identity() if kind == "none" else nn.Linear(width, dim)


class ProjectionHead(nn.Module):
    """Linear, a residual block with dropout, and a LayerNorm (the code's later state)."""

    def __init__(self, width: int, dim: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, features: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Turn features ``(B, C)`` into ``(B, D)``; with a generator, some are dropped."""
        projected = self.project(features)
        change = self.block(projected)
        if rng is not None:  # torch's own dropout draws globally, which no resume restores
            kept = torch.from_numpy(rng.random(tuple(change.shape)) >= self.dropout)
            change = change * kept.to(change) / (1 - self.dropout)
        return self.norm(change + projected)


def alignment_logits(features: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Return similarities of images and classes, ``(B, K)`` (equations 4 and 5).

    Args:
        features: ``(B, D)``, not normalised.
        texts: ``(K, D)``.
        scale: By what cosines are multiplied.
    """
    return scale * unit(features) @ texts.T


def mean_cosine(rows: Tensor) -> float:
    """Return the mean cosine between two different rows of ``(K, D)``."""
    count = len(rows)
    sums = unit(rows).sum(dim=0).square().sum()
    return float((sums - count) / (count * (count - 1)))
