"""Conversion of patch scores to anomaly maps and image scores: pure functions on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.constant_tensors import cached_tensor
from anomaly_clip.errors import check_at_least, check_between

__all__ = ["gaussian_blur", "image_score", "patches_to_map", "resize_maps"]

ImageScoreRule = Literal["max", "mean", "top_mean"]
BLOCK, BLOCK_ELSEWHERE = {"cpu": 64}, 256
"""Rows of a blurred map computed at once, by device type. Small blocks skip more zeros, but
other devices wait longer for many small products."""


def patches_to_map(scores: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Arrange patch scores ``(B, N)`` as a square grid and upsample bilinearly to ``(B, *size)``.

    Args:
        scores: One value per patch, row by row, without the class token.
        size: Height and width of the map in pixels.
        align_corners: False for SDP and most detectors, True for SDP+ (CLIP-AD's two conventions).

    Raises:
        ValueError: If ``N`` is not a square number.

    Example:
        >>> import torch
        >>> from anomaly_clip.maps import patches_to_map
        >>> patches_to_map(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), (2, 4))[0, 0]
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    num_patches = scores.shape[-1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"patches_to_map: {num_patches} patches are not a square; is the class token still "
            "there?"
        )
    grid = scores.reshape(-1, side, side)  # (B, side, side)
    return resize_maps(grid, size, align_corners=align_corners)


def resize_maps(maps: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Resize maps ``(B, h, w)`` bilinearly to ``(B, *size)``; return maps of this size as is."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    resized = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=align_corners)
    return resized[:, 0]


def gaussian_blur(
    maps: Tensor,
    sigma: float,
    *,
    truncate: float = 4.0,
    border: Literal["edge", "inner"] = "edge",
) -> Tensor:
    """Blur ``(..., h, w)`` maps like SciPy's ``gaussian_filter``.

    With a reflected border and a separable kernel, the filter is a product with two small banded
    matrices: ``blurred = R @ map @ C.T``. On a CPU this is several times faster than a convolution
    or SciPy at the usual sizes, and a batch on a GPU needs two products.

    Args:
        maps: Floating-point maps of any batch shape.
        sigma: Standard deviation in pixels; 0 returns the maps as they are.
        truncate: Radius of the kernel in standard deviations.
        border: Reflection at the border: ``edge`` repeats the edge pixel (SciPy's reflect),
            ``inner`` does not (torch's).

    Raises:
        ValueError: If ``sigma`` is negative or not a number.
    """
    check_at_least("gaussian_blur: sigma", sigma, 0)
    if sigma == 0:
        return maps
    radius = int(truncate * sigma + 0.5)
    rows, columns = (
        _blur_matrix(size, float(sigma), radius, border, maps.device, maps.dtype)
        for size in maps.shape[-2:]
    )
    with torch.autocast(maps.device.type, enabled=False):  # or the products would be in 16 bits
        blocks = [block @ maps[..., band, :] for block, band in _blocks(rows, radius)]
        blurred = _joined(blocks, dim=-2)
        blocks = [blurred[..., band] @ block.T for block, band in _blocks(columns, radius)]
        return _joined(blocks, dim=-1)


def image_score(maps: Tensor, rule: ImageScoreRule = "max", fraction: float = 0.01) -> Tensor:
    """Reduce maps ``(B, h, w)`` to one score per image ``(B,)``.

    Args:
        maps: Higher = more anomalous.
        rule: ``max``; ``mean``; ``top_mean``: the mean of the highest pixels.
        fraction: Fraction of the pixels that ``top_mean`` averages, at least one pixel.

    Raises:
        ValueError: If the rule is unknown or the fraction is not in (0, 1].
    """
    flat = maps.flatten(1)  # (B, h * w)
    if rule == "max":
        return flat.amax(dim=1)
    if rule == "mean":
        return flat.mean(dim=1)
    if rule != "top_mean":
        raise ValueError(f"image_score: unknown rule {rule!r}; known: max, mean, top_mean")
    check_between("image_score: fraction", fraction, 0, 1, open_low=True)
    num_pixels = max(1, round(fraction * flat.shape[1]))
    return flat.topk(num_pixels, dim=1).values.mean(dim=1)


@cached_tensor(maxsize=32)
def _blur_matrix(
    size: int, sigma: float, radius: int, border: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the ``(size, size)`` matrix that blurs a column, computed in float64 on the CPU."""
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    kernel /= kernel.sum()
    # "edge": ... 1 0 | 0 1 ... n-1 | n-1 ..., of period 2n; "inner": ... 2 1 | 0 1 ...
    again = 1 if border == "edge" else 0
    period = max(1, 2 * size - 2 + 2 * again)
    source = (torch.arange(size)[:, None] + offsets) % period
    source = torch.where(source < size, source, period - again - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, source, kernel.expand(size, -1).contiguous())
    return matrix.to(device, dtype)


def _blocks(matrix: Tensor, radius: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield blocks of rows of a banded matrix without the zeros, with the columns of each."""
    size, step = matrix.shape[0], BLOCK.get(matrix.device.type, BLOCK_ELSEWHERE)
    for start in range(0, size, step):
        stop = min(size, start + step)
        band = slice(max(0, start - radius), min(size, stop + radius))
        yield matrix[start:stop, band], band


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
