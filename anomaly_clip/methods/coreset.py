"""Greedy k-centre selection: a few points such that every point is near one of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly_clip.progress import track

__all__ = ["k_centre_greedy", "project", "projected_width", "seconds_per_centre"]

AT_ONCE = 1 << 15
"""Points projected at once."""
FEWEST, MOST = 32, 256
"""Candidates of a block, at least and at most; our choice. On real patches, about 60 % are used."""
IN_CACHE = 1 << 18
"""Distances computed at once on a CPU, 1 MiB in float32: they stay in the cache of a core."""
ON_DEVICE = 1 << 22
"""Distances computed at once on any other device, which takes longer to start many small steps."""


def k_centre_greedy(points: Tensor, count: int, start: int) -> Tensor:
    """Select ``count`` points, each as far as possible from those selected before.

    This is the plain greedy order, in which the first of equally far points is next, computed in
    blocks. A block's candidates are the points farthest from all selected ones. The next point is
    one of them as long as it is farther than all other points were at the start of the block: a
    distance from the nearest selected point can only decrease. So a block needs the distances
    between its candidates, and one matrix product of all points with the selected candidates, where
    the plain algorithm reads all points from memory for each of them.

    Distances are computed as ``|x - c|^2 = |x|^2 - 2 x.c + |c|^2``. No point is selected twice,
    even if some points are equal.

    Args:
        points: ``(M, C)``.
        count: Number of points to select, between 1 and ``M``.
        start: Index of the point selected first.

    Returns:
        Indices, int64 ``(count,)``, in the order of selection.
    """
    points = points - points.mean(dim=0)  # keeps distances and reduces rounding errors
    with _full_precision():
        selected = islice(_farthest_first(points, start), count)
        return torch.stack(list(track(selected, "choosing patches", count))).cpu()


def _farthest_first(points: Tensor, start: int) -> Iterator[Tensor]:
    """Yield the index of each selected point, as long as there are others."""
    lengths = points.square().sum(dim=1)
    nearest = torch.full_like(lengths, torch.inf)  # squared distance from the selected points
    selected = torch.tensor([start], device=points.device)
    num_candidates = FEWEST
    while True:
        yield from selected
        _include(selected, nearest, points, lengths)
        selected = _next_block(num_candidates, nearest, points, lengths)
        num_candidates = min(max(FEWEST, 2 * len(selected)), MOST)


def _include(selected: Tensor, nearest: Tensor, points: Tensor, lengths: Tensor) -> None:
    """Update ``nearest`` ``(M,)`` with further selected points ``(k,)``."""
    centres, lengths_of_centres = points[selected].T, lengths[selected]  # (C, k), (k,)
    most = IN_CACHE if points.device.type == "cpu" else ON_DEVICE
    step = max(1, most // len(selected))
    parts = (values.split(step) for values in (nearest, points, lengths))
    for near, some, lengths_of_some in zip(*parts, strict=True):
        distances = torch.addmm(lengths_of_centres, some, centres, alpha=-2)  # (step, k), - |x|^2
        torch.minimum(near, distances.amin(dim=1).add_(lengths_of_some), out=near)
    nearest[selected] = -torch.inf


def _next_block(most: int, nearest: Tensor, points: Tensor, lengths: Tensor) -> Tensor:
    """Return the indices ``(k,)`` of the next selected points, at least one of them.

    One transfer brings all values to the host, which then chooses without waiting for the device.
    """
    most = min(most, len(points) - 1)
    farthest = nearest.topk(most + 1)
    candidates = farthest.indices[:most].sort().values  # the first of equally far ones is next
    rows, lengths_of_rows = points[candidates], lengths[candidates]
    between = torch.addmm(lengths_of_rows, rows, rows.T, alpha=-2).add_(lengths_of_rows[:, None])
    bound = farthest.values[most:]  # of all other points
    table = torch.cat([bound, nearest[candidates], between.flatten()]).cpu().numpy()
    places = _leading(table[1 : most + 1], table[most + 1 :].reshape(most, most), table[0])
    if not places:  # others are as far as the farthest candidate
        return nearest.argmax(dim=0, keepdim=True)
    return candidates[torch.tensor(places, device=candidates.device)]


def _leading(nearest: np.ndarray, between: np.ndarray, bound: float) -> list[int]:
    """Return the candidates, in the order of selection, that are farther than all other points.

    Args:
        nearest: ``(m,)``, squared distances of the candidates from selected points; overwritten.
        between: ``(m, m)``, squared distances between candidates.
        bound: The largest squared distance of another point from the selected ones.
    """
    places: list[int] = []
    place = int(nearest.argmax())
    while nearest[place] > bound:
        places.append(place)
        np.minimum(nearest, between[place], out=nearest)
        nearest[place] = -np.inf
        place = int(nearest.argmax())
    return places


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute products in full precision, whatever torch is set to: TF32 changes the order."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    kept = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, kept, strict=True):
            setting.fp32_precision = value


def seconds_per_centre(rows: int, width: int, device: torch.device) -> float:
    """Estimate the time to select one of ``rows`` points by timing a block of fewer points."""
    points = torch.zeros(min(rows, 20_000), width, device=device)
    lengths, nearest = torch.zeros(2, len(points), device=device)
    selected = torch.zeros(MOST // 2, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        _include(selected, nearest, points, lengths)
        float(nearest[0])  # waits for the result, also on a GPU
        seconds.append(time.perf_counter() - begun)
    return min(seconds) / len(selected) * rows / len(points)


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
