"""Greedy k-centre: few points such that every point has one of them near."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anomaly_clip.progress import track

__all__ = ["k_centre_greedy", "project", "projected_width"]

AT_ONCE = 1 << 15
"""Points projected at once."""


def k_centre_greedy(points: Tensor, count: int, start: int) -> Tensor:
    """Choose ``count`` points: after a first one, always the one farthest from all chosen.

    A centre costs one matrix-vector product, as ``|x - c|^2 = |x|^2 - 2 x.c + |c|^2``. No point is
    chosen twice, also where several are equal.

    Args:
        points: ``(M, C)``.
        count: How many, between 1 and ``M``.
        start: The first.

    Returns:
        int64 ``(count,)``, in the order of choice.
    """
    points = points - points.mean(dim=0)  # distances stay, and rounding becomes small
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
    """Return how many dimensions :func:`project` leaves of ``width``."""
    from sklearn.random_projection import johnson_lindenstrauss_min_dim  # half a second

    return min(width, int(johnson_lindenstrauss_min_dim(count, eps=eps)))


def project(
    points: Tensor, seed: int, eps: float = 0.9, device: torch.device | None = None
) -> Tensor:
    """Project points at random to as few dimensions as keep distances within ``eps``.

    It is scikit-learn's sparse projection (Johnson and Lindenstrauss); points that have no more
    dimensions than that keep theirs.

    Args:
        points: ``(M, C)``, of any floating type.
        seed: Draws the projection.
        eps: How far squared distances may be off, as a share.
        device: Where the result is to be; default: where the points are.

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
