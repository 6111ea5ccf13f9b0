"""TAB's alignment logits, and its heads, which map image features to the width of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anomaly_clip.backbones.clip import unit

__all__ = [
    "BatchDraws",
    "Head",
    "ProjectionHead",
    "alignment_logits",
    "apply_head",
    "make_head",
    "mean_cosine",
]

Head = Literal["auto", "none", "linear", "projection"]


def make_head(kind: Head, network: tuple[str, int], text: tuple[str, int]) -> nn.Module:
    """Return a head for normal or for abnormal images.

    Args:
        kind: Type of the head; auto: projection if the widths differ, else none.
        network: Name of the ResNet and width of its features.
        text: Name of the CLIP model and width of its text features.

    Raises:
        ValueError: If the widths differ and ``kind`` is none.
    """
    (name, width), (text_name, dim) = network, text
    if kind == "auto":
        kind = "none" if dim == width else "projection"
    if kind == "none" and dim != width:
        raise ValueError(
            f"model.head none needs equal widths, but {name} has {width} channels and {text_name} "
            f"has {dim}: set model.head to projection"
        )
    if kind == "projection":
        return ProjectionHead(width, dim)
    return nn.Identity() if kind == "none" else nn.Linear(width, dim)


class BatchDraws:
    """Random numbers of a batch that several processes share: the same as in one process.

    Process r has the images r, r + P, ... of the batch; see
    :class:`anomaly_clip.data.samplers.EpochSampler`.

    Args:
        key: Seed, the same in all processes.
        num_processes: Number of processes, P.
        rank: Process, r.
    """

    def __init__(self, key: Sequence[int], num_processes: int = 1, rank: int = 0) -> None:
        self.rng = np.random.default_rng([*key, 0])
        self.num_processes = num_processes
        self.rank = rank

    def random(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return numbers of a shape ``(B, ...)``, uniform in [0, 1), for the B images here."""
        drawn = self.rng.random((self.num_processes * shape[0], *shape[1:]))
        return drawn[self.rank :: self.num_processes]


class ProjectionHead(nn.Module):
    """Linear layer, residual block with dropout and LayerNorm, as in the authors' later code."""

    def __init__(self, width: int, dim: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, features: Tensor, rng: BatchDraws | None = None) -> Tensor:
        """Map features ``(B, C)`` to ``(B, D)``, with dropout if a generator is given."""
        projected = self.project(features)
        change = self.block(projected)
        if rng is not None:  # torch's own dropout draws globally, which no resume restores
            kept = torch.from_numpy(rng.random(tuple(change.shape)) >= self.dropout)
            change = change * kept.to(change) / (1 - self.dropout)
        return self.norm(change + projected)


def apply_head(head: nn.Module, features: Tensor, rng: BatchDraws | None) -> Tensor:
    """Map features ``(B, C)`` to ``(B, D)``; only a projection head has dropout."""
    headed: Tensor = head(features, rng) if isinstance(head, ProjectionHead) else head(features)
    return headed


def alignment_logits(features: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Return scaled similarities between images and classes, ``(B, K)``; see docs/methods/tab.md.

    Args:
        features: ``(B, D)``, not normalised.
        texts: ``(K, D)``.
        scale: Logit scale, the factor of the similarities.
    """
    return scale * unit(features) @ texts.T


def mean_cosine(rows: Tensor) -> float:
    """Return the mean cosine over all pairs of different rows of ``(K, D)``."""
    count = len(rows)
    sums = unit(rows).sum(dim=0).square().sum()
    return float((sums - count) / (count * (count - 1)))
