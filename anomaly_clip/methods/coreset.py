"""Greedy k-centre selection: a few points such that every point is near one of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anomaly_clip.progress import track

__all__ = ["k_centre_greedy", "project", "projected_width"]

AT_ONCE = 1 << 15
"""Points projected at once."""


def k_centre_greedy(points: Tensor, count: int, start: int) -> Tensor:
    """Select ``count`` points, each as far as possible from those selected before.

    Each selected point costs one matrix-vector product, as ``|x - c|^2 = |x|^2 - 2 x.c + |c|^2``.
    No point is selected twice, even if some points are equal.

    Args:
        points: ``(M, C)``.
        count: Number of points to select, between 1 and ``M``.
        start: Index of the point selected first.

    Returns:
        Indices, int64 ``(count,)``, in the order of selection.
    """
    points = points - points.mean(dim=0)  # keeps distances and reduces rounding errors
    lengths = points.square().sum(dim=1)
    nearest = torch.full_like(lengths, torch.inf)
    chosen = torch.empty(count, dtype=torch.int64)
    at = start
    for number in track(range(count), "choosing patches"):
        chosen[number] = at
        distance = torch.addmv(lengths, points, points[at], alpha=-2)
        torch.minimum(nearest, distance.add_(lengths[at]), out=nearest)
        nearest[at] = -torch.inf
        at = int(nearest.argmax())
    return chosen


def projected_width(count: int, width: int, eps: float) -> int:
    """Return the number of dimensions that :func:`project` keeps out of ``width``."""
    from sklearn.random_projection import johnson_lindenstrauss_min_dim  # slow import: 0.5 s

    return min(width, int(johnson_lindenstrauss_min_dim(count, eps=eps)))


def project(
    points: Tensor, seed: int, eps: float = 0.9, device: torch.device | None = None
) -> Tensor:
    """Project points at random to the fewest dimensions that keep distances within ``eps``.

    This is scikit-learn's sparse random projection (Johnson-Lindenstrauss lemma). Points that
    already have this number of dimensions, or fewer, are not projected.

    Args:
        points: ``(M, C)``, of any floating-point type.
        seed: Seed of the projection.
        eps: Relative error allowed for squared distances.
        device: Device of the result; default: that of the points.

    Returns:
        float32 ``(M, D)``.
    """
    device = points.device if device is None else device
    fewer = projected_width(len(points), points.shape[1], eps)
    if fewer == points.shape[1]:
        return points.float().to(device)
    from sklearn.random_projection import SparseRandomProjection

    random = np.random.RandomState(seed)
    projection = SparseRandomProjection(fewer, random_state=random).fit(
        np.zeros((1, points.shape[1]), np.float32)
    )
    matrix = torch.from_numpy(projection.components_.toarray()).to(device, torch.float32).T
    projected = torch.empty(len(points), fewer, device=device)
    for start in track(range(0, len(points), AT_ONCE), "projecting patches"):
        part = points[start : start + AT_ONCE].to(device).float()
        torch.mm(part, matrix, out=projected[start : start + len(part)])
    return projected
