"""Per-region overlap (PRO): how much of every defect is detected, whatever its size.

The overlap of a ground-truth region (8-connected) at a threshold is the fraction of its pixels that
score above the threshold. PRO is the mean overlap of the regions of all images. The metric is the
area under the curve of PRO over the false positive rate, up to a limit of that rate. Two
conventions exist:

* exact (default): every distinct score is a threshold; trapezoids, cut at the limit by
  interpolation, as in MVTec's own evaluation;
* ``pro_steps``: equally spaced thresholds (usually 200), and false positive rates below the limit
  stretched to ``[0, 1]``, as in the code of most zero-shot papers.

docs/metrics.md compares them.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_clip.errors import check_between
from anomaly_clip.metrics.image import Ranking, as_array, check_scores, rank_sorted

__all__ = [
    "area_of_ranking",
    "area_of_steps",
    "bounds_of_steps",
    "check_pro_options",
    "in_order",
    "pro",
    "region_weights",
    "rounded_down",
    "step_thresholds",
]


def pro(
    maps: Tensor, masks: Tensor, *, fpr_limit: float = 0.3, pro_steps: int | None = None
) -> float:
    """Area under the PRO curve, normalised to ``[0, 1]``.

    NaN if regions or normal pixels are missing.

    Args:
        maps: Floating ``(B, h, w)``; higher = more anomalous.
        masks: bool ``(B, h, w)``.
        fpr_limit: False positive rate up to which the curve is integrated, in (0, 1].
        pro_steps: None: exact. A number: that many equally spaced thresholds (papers: 200).

    Raises:
        ValueError: If shapes, types or values are invalid.

    Example:
        >>> import torch
        >>> from anomaly_clip.metrics import pro
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[0, 0, 0] = True
        >>> pro(masks.float(), masks)
        1.0
    """
    maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
    if masks.ndim != 3:
        raise ValueError(f"pro: expected masks (B, h, w), got {tuple(masks.shape)}")
    check_pro_options(fpr_limit, pro_steps)
    flat, target = check_scores(maps, masks)
    weights = np.concatenate([np.zeros(0), *(region_weights(mask) for mask in masks.cpu().numpy())])
    scores = as_array(flat)
    defect, weights = in_order(scores[target.cpu().numpy()], weights)
    weights /= round(weights.sum()) or 1
    scores = np.sort(scores)
    if not len(defect) or len(scores) == len(defect):
        return math.nan
    if pro_steps is not None:
        return _stepwise(scores, defect, weights, fpr_limit, pro_steps)
    ranking = rank_sorted(scores, defect)
    ends = ranking.true_positives
    shares = np.add.reduceat(weights[::-1], np.append(0, ends[:-1]))
    return area_of_ranking(ranking, shares, fpr_limit)


def in_order(
    defect: NDArray[np.floating], weights: NDArray[np.float64]
) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
    """Return the scores of defect pixels in ascending order, with their weights."""
    order = ascending(defect) if defect.dtype == np.float32 else np.argsort(defect)
    return defect[order], weights[order]


def ascending(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the indices that sort fewer than 2^32 scores.

    Twice as fast as ``argsort``: integers are sorted whose upper halves have the order of the
    scores, and whose lower halves are the indices.
    """
    patterns = (scores + np.float32(0)).view(np.int32)  # without -0.0
    patterns ^= (patterns >> 31) & 0x7FFFFFFF  # negative numbers rise with their size
    keys = patterns.astype(np.int64)
    keys <<= 32
    keys |= np.arange(len(keys))
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def check_pro_options(fpr_limit: float, pro_steps: int | None) -> None:
    """Check the options of :func:`pro`.

    Raises:
        ValueError: If an option is out of range.
    """
    check_between("model.evaluator.fpr_limit", fpr_limit, 0, 1, open_low=True)
    if pro_steps is not None and pro_steps < 2:
        raise ValueError(f"model.evaluator.pro_steps must be null, or 2 or more, got {pro_steps}")


def region_weights(
    mask: NDArray[np.bool_], places: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return, for each defect pixel of a mask in pixel order, one over the size of its region.

    Regions are 8-connected. The weights of a region add up to 1, so sums over pixels count
    regions.

    Args:
        mask: ``(h, w)``.
        places: Flat indices of the defect pixels; found here by default.
    """
    places = np.flatnonzero(mask) if places is None else places
    if not len(places):
        return np.zeros(0)
    # Defects are small, so only their bounding box is labelled; it keeps the order of the pixels.
    width = mask.shape[1]
    strip = mask[places[0] // width : places[-1] // width + 1]
    columns = np.flatnonzero(np.logical_or.reduce(strip, axis=0))
    box = np.ascontiguousarray(strip[:, columns[0] : columns[-1] + 1])
    _, labels = cv2.connectedComponents(box.view(np.uint8), connectivity=8)
    members = labels[box]  # (pixels of the mask,)
    sizes = np.maximum(np.bincount(members), 1)  # label 0 has no defect pixel
    weights: NDArray[np.float64] = (1 / sizes)[members]
    return weights


def area_of_ranking(ranking: Ranking, shares: NDArray[np.float64], limit: float) -> float:
    """Integrate PRO over the false positive rate without building the curve.

    The curve rises only at the scores of defect pixels. A pixel with score s contributes linearly
    between the false positive rates a (normal pixels above s) and c (at or above s), and fully
    beyond c. The pixel's part of the area up to the limit therefore has a closed form.

    Args:
        ranking: Ranking of the pixels.
        shares: Fractions of the regions that have each score of the ranking; their sum is 1.
        limit: False positive rate up to which PRO is integrated.
    """
    total, at_least = ranking.num_normal, ranking.at_least
    area = (ranking.above + at_least) * (-0.5 / total)  # of pixels that end before the limit
    area += limit
    crossing = np.flatnonzero(at_least > limit * total)
    first, last = ranking.above[crossing] / total, at_least[crossing] / total
    rest = np.clip(limit - first, 0, None)
    area[crossing] = rest**2 / (2 * (last - first).clip(min=1 / (2 * total)))
    return float(area @ shares / limit)


def _stepwise(
    scores: NDArray[np.floating],
    defect: NDArray[np.floating],
    weights: NDArray[np.float64],
    limit: float,
    steps: int,
) -> float:
    """Return the area over equally spaced thresholds; scores strictly above one are positive."""
    low, high = float(scores[0]), float(scores[-1])
    if high <= low:
        return math.nan
    cuts = rounded_down(step_thresholds(low, high, steps), scores.dtype)
    counts_below = np.searchsorted(scores, cuts, side="right")
    defects_below = np.searchsorted(defect, cuts, side="right")
    fpr = 1 - (counts_below - defects_below) / (len(scores) - len(defect))
    covered = np.concatenate([[0.0], weights.cumsum()])
    return area_of_steps(fpr, covered[-1] - covered[defects_below], limit)


def step_thresholds(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Return equally spaced thresholds from the lowest score up, excluding the highest score."""
    return low + np.arange(steps, dtype=np.float64) * ((high - low) / steps)


def rounded_down(thresholds: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.floating]:
    """Return thresholds in the precision of the scores.

    Rounding down does not change which scores are at or below a threshold. A search in double
    precision would copy all scores.
    """
    if dtype != np.float32:
        return thresholds
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


def area_of_steps(fpr: NDArray[np.float64], overlap: NDArray[np.float64], limit: float) -> float:
    """Return the area under PRO over the false positive rates below a limit.

    These rates are stretched to ``[0, 1]``.

    Args:
        fpr: False positive rates from the lowest threshold up, so in descending order.
        overlap: Mean overlap of the regions at the same thresholds.
        limit: False positive rate below which thresholds count.
    """
    kept = fpr < limit
    fpr, overlap = fpr[kept], overlap[kept]
    if len(fpr) < 2 or fpr.max() <= fpr.min():
        return math.nan
    fpr = (fpr - fpr.min()) / (fpr.max() - fpr.min())
    area = float(((overlap[1:] + overlap[:-1]) / 2 * -np.diff(fpr)).sum())
    return min(max(area, 0.0), 1.0)  # sums of fractions have rounding errors


def bounds_of_steps(
    fpr: tuple[NDArray[np.float64], NDArray[np.float64]],
    overlap: tuple[NDArray[np.float64], NDArray[np.float64]],
    limit: float,
) -> tuple[float, float]:
    """Return the lowest and the highest :func:`area_of_steps` of all curves between two curves.

    The area is a weighted mean. The values are the mean overlaps of neighbouring thresholds, and
    the weights are the fractions of the range of false positive rates between these thresholds.
    Overlaps rise as thresholds fall. The area is therefore the lowest value plus the steps between
    successive values, each times the fraction of the range at the lower thresholds. The bounds of
    the rates bound this fraction. If several thresholds may be the first below the limit, all of
    them are tried.

    Args:
        fpr: Lowest and highest rates from the lowest threshold up, so in descending order.
        overlap: Lowest and highest overlaps at the same thresholds.
        limit: False positive rate below which thresholds count.
    """
    least, most = fpr
    can_be_kept, must_be_kept = least < limit, most < limit
    lowest, highest = 1.0, 0.0
    for first in np.flatnonzero(can_be_kept & np.append(True, ~must_be_kept[:-1])):
        low, high = least[first:], np.minimum(most[first:], limit)
        if len(low) < 2 or low[0] <= high[-1]:
            return 0.0, 1.0  # the range itself is unknown
        middle = [(values[first:][1:] + values[first:][:-1]) / 2 for values in overlap]
        # Fraction of the range between the first kept threshold and the end of each step.
        with np.errstate(invalid="ignore", divide="ignore"):
            least_part = (low[0] - high[1:-1]) / (low[0] - low[-1])
            most_part = (high[0] - low[1:-1]) / (high[0] - high[-1])
        steps = [-np.diff(values) for values in middle]
        lowest = min(lowest, middle[0][-1] + steps[0] @ np.clip(least_part, 0, 1))
        highest = max(highest, middle[1][-1] + steps[1] @ np.clip(most_part, 0, 1))
    return (lowest, highest) if lowest <= highest else (0.0, 1.0)
