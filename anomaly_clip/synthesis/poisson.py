"""Poisson blending: insert a patch into an image by its gradients, without visible edges.

The equation is solved exactly on the bounding box of the mask by a type-I sine transform. The
unknown is written as *background + change*. The change is zero on the outer ring of the box. Its
Laplacian is the divergence of the difference between new and old gradients inside the mask (Perez,
Gangnet, Blake, 2003). The rules for masks and for mixed gradients are those of OpenCV's
``seamlessClone``, which the authors' code of NSA calls. Our results are within one grey level of
OpenCV's, take a fraction of the time and do not depend on OpenCV's version.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import dstn, idstn

__all__ = ["Gradients", "blend", "blend_opencv", "bounding_box", "solve"]

Gradients = Literal["normal", "mixed"]

ERODED = 3  # erosions of the mask by a 3 x 3 square before gradients are exchanged
LARGEST_PRODUCT = 256  # largest side at which products with sine matrices beat the fast transform

FRAME = (2, 2, 2, 2)  # pixels of padding around the box for OpenCV

Floats = NDArray[np.float64]
Whole = NDArray[np.int16]


def blend(
    background: NDArray[np.uint8],
    patch: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    gradients: Gradients = "normal",
) -> NDArray[np.uint8]:
    """Blend a patch into the part of an image that the patch covers.

    Args:
        background: ``(h, w, 3)``, the part of the image.
        patch: ``(h, w, 3)``.
        mask: ``(h, w)``, pixels of the patch to blend.
        gradients: normal: gradients of the patch; mixed: at each pixel, either the patch's gradient
            or the background's, whichever has components that differ more (OpenCV's rule, not the
            paper's).

    Returns:
        ``(h, w, 3)``: the background, changed only inside the bounding box of the mask and never on
        the outer ring of that box.

    Raises:
        ValueError: If background, patch and mask differ in size.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.synthesis.poisson import blend
        >>> background = np.full((9, 9, 3), 50, np.uint8)
        >>> flat = blend(background, np.full((9, 9, 3), 200, np.uint8), np.ones((9, 9), bool))
        >>> bool((flat == 50).all())  # a patch without gradients changes nothing
        True
    """
    if background.shape != patch.shape or background.shape[:2] != mask.shape:
        raise ValueError(
            f"background {background.shape}, patch {patch.shape} and mask {mask.shape} must have "
            "the same size: resize them"
        )
    result = background.copy()
    box = bounding_box(mask)
    if box is None:
        return result
    inner = cv2.erode(
        mask[box].view(np.uint8),
        np.ones((3, 3), np.uint8),
        iterations=ERODED,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    if not inner.any():  # including boxes without an interior
        return result
    # 16-bit integers until the transform, because a vector instruction handles four times as many
    # of them as of doubles.
    below, above = (
        part[box].transpose(2, 0, 1).astype(np.int16, order="C") for part in (background, patch)
    )
    change = solve(_divergence(below, above, inner.astype(np.int16), gradients).astype(np.float64))
    change += below[:, 1:-1, 1:-1]
    # Added before truncation, because the transform returns unchanged pixels as near-integers.
    change += 1e-9
    np.clip(change, 0, 255, out=change)
    result[box][1:-1, 1:-1] = change.astype(np.uint8).transpose(1, 2, 0)
    return result


def solve(laplacian: Floats) -> Floats:
    """Solve the 5-point Poisson equation with zero boundary values.

    Args:
        laplacian: ``(C, h, w)``, sum of the four neighbours minus four times the pixel.

    Returns:
        ``(C, h, w)``.
    """
    height, width = laplacian.shape[1:]
    eigenvalues = _eigenvalues(height)[:, None] + _eigenvalues(width)
    if max(height, width) > LARGEST_PRODUCT:
        spectrum = dstn(laplacian, type=1, axes=(1, 2), norm="ortho") / eigenvalues
        return np.asarray(idstn(spectrum, type=1, axes=(1, 2), norm="ortho"), np.float64)
    rows, columns = _sines(height), _sines(width)  # each matrix is its own inverse
    spectrum = rows @ laplacian @ columns
    spectrum /= eigenvalues
    return np.asarray(rows @ spectrum @ columns, np.float64)


def blend_opencv(
    background: NDArray[np.uint8],
    patch: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    gradients: Gradients = "normal",
) -> NDArray[np.uint8]:
    """Blend as :func:`blend` does, with OpenCV's ``seamlessClone``, for comparison.

    OpenCV has three pitfalls: it places the bounding box of the mask rather than the patch, it
    clears the outermost rows and columns of the caller's mask in place, and the box must lie inside
    the image. OpenCV therefore gets padded copies of this box.
    """
    result = background.copy()
    box = bounding_box(mask)
    if box is None:
        return result
    small = cv2.copyMakeBorder(mask[box].astype(np.uint8) * 255, *FRAME, cv2.BORDER_CONSTANT)
    below, above = (
        cv2.copyMakeBorder(part[box], *FRAME, cv2.BORDER_REPLICATE) for part in (background, patch)
    )
    height, width = mask[box].shape
    centre = (FRAME[0] + width // 2, FRAME[0] + height // 2)
    kind = cv2.NORMAL_CLONE if gradients == "normal" else cv2.MIXED_CLONE
    try:
        cloned = cv2.seamlessClone(above, below, small, centre, kind)
    except cv2.error:  # boxes too small for OpenCV
        return result
    edge = FRAME[0]
    result[box] = cloned[edge:-edge, edge:-edge]
    return result


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Return the bounding rows and columns of a mask; None if it is empty."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return (slice(top, top + height), slice(left, left + width)) if width else None


def _divergence(below: Whole, above: Whole, inner: Whole, gradients: Gradients) -> Whole:
    """Return the divergence of the change of gradients, ``(C, h - 2, w - 2)``."""
    if gradients == "normal":
        change_y, change_x = _forward(above - below)
    else:
        (below_y, below_x), (above_y, above_x) = _forward(below), _forward(above)
        taken = np.abs(above_x - above_y) > np.abs(below_x - below_y)
        change_y, change_x = (above_y - below_y) * taken, (above_x - below_x) * taken
    inner = inner[:-1, :-1]  # the last row and column keep their gradients
    change_y *= inner
    change_x *= inner
    divergence = change_y[:, 1:, 1:] - change_y[:, :-1, 1:]
    divergence += change_x[:, 1:, 1:]
    divergence -= change_x[:, 1:, :-1]
    return divergence


def _forward(planes: Whole) -> tuple[Whole, Whole]:
    """Return forward differences down and to the right, without the last row and column."""
    first = planes[:, :-1, :-1]
    return planes[:, 1:, :-1] - first, planes[:, :-1, 1:] - first


@lru_cache(maxsize=1024)
def _eigenvalues(size: int) -> Floats:
    return 2 * np.cos(np.pi * np.arange(1, size + 1) / (size + 1)) - 2


@lru_cache(maxsize=512)
def _sines(size: int) -> Floats:
    """Return the matrix of the orthonormal sine transform of type I; it is its own inverse."""
    numbers = np.arange(1, size + 1)
    return np.sqrt(2 / (size + 1)) * np.sin(np.pi * np.outer(numbers, numbers) / (size + 1))
