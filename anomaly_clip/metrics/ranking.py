"""Exact pixel metrics: each pixel is kept, and the anomalous ones are ranked.

AUROC, AP, F1-max and PRO change only at the scores of anomalous pixels, which are few. A normal
pixel therefore needs no place among the other normal pixels: it is enough to know between which two
of these scores, the thresholds, it lies. Scores are divided into cells, equal intervals over the
range of the thresholds. In a cell without thresholds, scores are only counted. Those in the other
cells are selected, sorted and compared with the thresholds.

The cell of a score is computed with rounding errors, but by the same operations for scores and
thresholds, none of which changes the order of two numbers. The counts are therefore exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.metric_values import PIXEL_METRICS
from anomaly_clip.metrics.curves import pixel_curves, sampled_counts
from anomaly_clip.metrics.image import Ranking, as_array
from anomaly_clip.metrics.pixel import (
    Defects,
    PixelResult,
    check_pixels,
    concatenated,
    defects_of,
    gather_any,
    image_extremes,
    weights_of,
)
from anomaly_clip.metrics.pro import (
    area_of_ranking,
    area_of_steps,
    check_pro_options,
    in_order,
    rounded_down,
    step_thresholds,
)
from anomaly_clip.metrics.windows import histogram, looked_up
from anomaly_clip.progress import track

__all__ = ["PixelRanking", "normal_counts", "sorted_counts"]

Counts = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Numbers of scores above, and at or above, each threshold."""

NUM_CELLS = 1 << 16
BLOCK = 1 << 15
"""Scores handled at once, so that intermediate results stay in the processor's cache."""
CHUNK = 1 << 22
"""Scores counted at once."""
FEW = 1 << 16
"""Up to this many scores are sorted, which costs less than dividing them into cells."""
SAMPLE = 1 << 14
"""About as many scores are sampled to choose the range of the cells."""
TOP = 0.05
"""Fraction of the scores in the last cell. Most thresholds lie there, because detectors assign the
highest scores to defects. Our choice: the other cells are then narrow where scores are dense."""
CROWDED = 0.6
"""All scores are sorted if more than this fraction would be selected."""


class PixelRanking(Metric):
    """Keep the scores of all pixels and rank them exactly, in at most 12 bytes per pixel.

    Args:
        num_rows: Number of separate evaluations.
        fpr_limit: False positive rate up to which PRO is integrated.
        pro_steps: None: exact PRO. A number: PRO over that many equally spaced thresholds.
    """

    full_state_update = False
    extremes: Tensor

    def __init__(
        self, num_rows: int = 1, *, fpr_limit: float = 0.3, pro_steps: int | None = None
    ) -> None:
        super().__init__(dist_sync_fn=gather_any, compute_on_cpu=True)
        check_pro_options(fpr_limit, pro_steps)
        self.num_rows = num_rows
        self.fpr_limit = fpr_limit
        self.pro_steps = pro_steps
        for row in range(num_rows):
            # Normal pixels are given by whole maps, with -inf in place of the anomalous ones.
            for name in ("normal", "defect", "weight"):
                self.add_state(f"{name}_{row}", [], dist_reduce_fx="cat")
        # The negated lowest score and the highest score, so that both merge by maximum.
        worst = torch.full((num_rows, 2), -math.inf, dtype=torch.float64)
        self.add_state("extremes", worst, dist_reduce_fx="max")

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        rows: Tensor | None = None,
        names: Sequence[str] | None = None,
        defects: Sequence[Defects] | None = None,
    ) -> None:
        """Add images; see :meth:`PixelHistogram.update`."""
        rows = check_pixels(maps, masks, rows, self.num_rows)
        if not maps.numel():
            return
        defects = defects_of(masks) if defects is None else defects
        extremes = image_extremes(maps, names)
        scores = as_array(maps)
        for row in sorted(set(rows.tolist())):
            chosen = np.flatnonzero(rows.numpy() == row)
            normal = scores[chosen]  # a copy, whose anomalous pixels are taken out
            of_row = [defects[place] for place in chosen.tolist()]
            defect, weights = [], weights_of(of_row)
            for image, (at, _) in zip(normal.reshape(len(chosen), -1), of_row, strict=True):
                defect.append(image.take(at))
                # Below all thresholds. Leaving these pixels out would copy the image again.
                image[at] = -np.inf
            self._state("normal", row).append(torch.from_numpy(normal.reshape(-1)))
            if len(weights):
                self._state("defect", row).append(torch.from_numpy(np.concatenate(defect)))
                self._state("weight", row).append(torch.from_numpy(weights))
            worst = torch.tensor([-extremes[chosen, 0].min(), extremes[chosen, 1].max()])
            self.extremes[row] = self.extremes[row].maximum(worst)

    def compute(self) -> list[PixelResult]:
        """Return the metrics of all rows."""
        return [self._row_result(row) for row in track(range(self.num_rows), "pixel metrics")]

    def _row_result(self, row: int) -> PixelResult:
        metrics: dict[str, float | None] = dict.fromkeys(PIXEL_METRICS)
        state = self._state("normal", row)
        parts = [part.numpy() for part in ([state] if isinstance(state, Tensor) else state)]
        defect, weight = (concatenated(self._state(name, row)) for name in ("defect", "weight"))
        num_normal = sum(map(len, parts)) - len(defect)
        if not len(defect) or not num_normal:
            return PixelResult(metrics, {})
        hit, weights = in_order(defect.numpy(), weight.numpy())
        weights /= round(weights.sum())
        first = np.flatnonzero(np.append(True, hit[1:] != hit[:-1]))
        above, at_least = normal_counts(parts, hit[first])
        tied = np.diff(first, append=len(hit))
        ranking = Ranking(tied[::-1], above[::-1], at_least[::-1], num_normal)
        shares = np.add.reduceat(weights, first)[::-1]
        if self.pro_steps is None:
            overlap = area_of_ranking(ranking, shares, self.fpr_limit)
        else:
            overlap = self._stepwise(row, parts, hit, weights, self.pro_steps)
        values_of = (ranking.auroc(), ranking.average_precision(), ranking.f1_max(), overlap)
        for name, value in zip(PIXEL_METRICS, values_of, strict=True):
            metrics[name] = None if math.isnan(value) else value
        curves = pixel_curves(*sampled_counts(ranking, shares), fpr_limit=self.fpr_limit)
        return PixelResult(metrics, {}, curves)

    def _stepwise(
        self,
        row: int,
        parts: list[NDArray[np.floating]],
        defect: NDArray[np.floating],
        weights: NDArray[np.float64],
        steps: int,
    ) -> float:
        """Return PRO over equally spaced thresholds; scores strictly above one are positive."""
        low, high = -float(self.extremes[row, 0]), float(self.extremes[row, 1])
        if high <= low:
            return math.nan
        cuts = rounded_down(step_thresholds(low, high, steps), defect.dtype)
        num_normal = sum(map(len, parts)) - len(defect)
        above, _ = normal_counts(parts, cuts)
        covered = np.append(0.0, weights.cumsum())
        overlap = covered[-1] - covered[np.searchsorted(defect, cuts, side="right")]
        return area_of_steps(1 - (num_normal - above) / num_normal, overlap, self.fpr_limit)

    def _state(self, name: str, row: int) -> list[Tensor]:
        state: list[Tensor] = getattr(self, f"{name}_{row}")
        return state


def sorted_counts(parts: Sequence[NDArray[Any]], thresholds: NDArray[Any]) -> Counts:
    """Count scores by sorting all of them; the plain form of :func:`normal_counts`."""
    scores = np.concatenate(parts)
    scores.sort()
    above, at_least = (scores.searchsorted(thresholds, side) for side in ("right", "left"))
    return len(scores) - above, len(scores) - at_least


def normal_counts(parts: Sequence[NDArray[Any]], thresholds: NDArray[Any]) -> Counts:
    """Return the numbers of scores above, and at or above, each threshold.

    Args:
        parts: Arrays of scores, ``(n,)`` each. Infinite scores are allowed, NaN is not.
        thresholds: Distinct finite scores in ascending order, ``(t,)``.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.metrics.ranking import normal_counts
        >>> parts = [np.array([0.1, 0.3]), np.array([0.3])]
        >>> above, at_least = normal_counts(parts, np.array([0.3]))
        >>> int(above[0]), int(at_least[0])
        (0, 2)
    """
    num_scores = sum(map(len, parts))
    cells = None
    if num_scores > FEW and all(part.dtype == np.float32 for part in parts):
        step = max(1, num_scores // SAMPLE)
        sample = np.concatenate([part[::step] for part in parts])
        cells = Cells.around(sample, thresholds)
        if cells is not None and cells.is_crowded(sample, thresholds):
            cells = None
    return sorted_counts(parts, thresholds) if cells is None else cells.counts(parts, thresholds)


class Cells(NamedTuple):
    """Equal intervals of scores. Scores beyond the ends belong to the first and the last one."""

    low: np.float32
    high: np.float32
    scale: np.float32

    @classmethod
    def around(cls, sample: NDArray[np.float32], thresholds: NDArray[np.float32]) -> Cells | None:
        """Place cells around the thresholds below the highest scores; None if they cannot be."""
        first, last = thresholds[0], thresholds[-1]
        place = int(len(sample) * (1 - TOP))
        top = np.partition(sample, place)[place]
        with np.errstate(over="ignore", invalid="ignore"):
            high = np.nextafter(np.clip(top, first, last), np.float32(np.inf))
            # Scores below all thresholds have a cell of their own.
            low = np.nextafter(first - (high - first) / NUM_CELLS, np.float32(-np.inf))
            cells = cls(low, high, np.float32(NUM_CELLS - 1) / (high - low))
            return cells if all(map(np.isfinite, (high - low, cells.scale))) else None

    def is_crowded(self, sample: NDArray[np.float32], thresholds: NDArray[np.float32]) -> bool:
        """Return True if most of the scores share cells with thresholds, judged by a sample."""
        return bool(occupied(self.keys(thresholds))[self.keys(sample)].mean() > CROWDED)

    def keys(self, scores: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Return the cell of each score."""
        keys = np.empty(len(scores), np.uint16)
        self.assign(scores, np.empty_like(scores), keys)
        return keys

    def assign(
        self, scores: NDArray[np.float32], scratch: NDArray[np.float32], keys: NDArray[np.uint16]
    ) -> None:
        """Write the cell of each score; memory of the same length is used on the way."""
        np.clip(scores, self.low, self.high, out=scratch)
        scratch -= self.low
        scratch *= self.scale
        keys[:] = scratch

    def counts(
        self, parts: Sequence[NDArray[np.float32]], thresholds: NDArray[np.float32]
    ) -> Counts:
        """Return the numbers of scores above, and at or above, each threshold."""
        cell = self.keys(thresholds)
        chosen, counts = occupied(cell), np.zeros(NUM_CELLS, np.int64)
        # Fresh memory costs more than the arithmetic, so all of it is used again and again.
        keys, scratch = np.empty(CHUNK, np.uint16), np.empty(BLOCK, np.float32)
        selected = np.empty(sum(map(len, parts)), np.float32)  # only its beginning is touched
        num_keys = num_selected = 0
        for part in parts:
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                if num_keys + len(block) > CHUNK:
                    counts += histogram(keys[:num_keys], NUM_CELLS)
                    num_keys = 0
                of_block = keys[num_keys : num_keys + len(block)]
                num_keys += len(block)
                self.assign(block, scratch[: len(block)], of_block)
                places = np.flatnonzero(looked_up(chosen, of_block))
                end = num_selected + len(places)
                block.take(places, out=selected[num_selected:end], mode="clip")
                num_selected = end
        counts += histogram(keys[:num_keys], NUM_CELLS)
        counts[chosen] = 0
        beyond = (counts[::-1].cumsum()[::-1])[cell]  # scores in higher cells without thresholds
        kept = selected[:num_selected]
        kept.sort()
        not_above = kept.searchsorted(thresholds, "right")
        beyond += len(kept)
        above = beyond - not_above
        at_least = above.copy()
        if not len(kept):
            return above, at_least
        tied = np.flatnonzero(kept.take(not_above - 1, mode="clip") == thresholds)
        at_least[tied] = beyond[tied] - kept.searchsorted(thresholds[tied], "left")
        return above, at_least


def occupied(keys: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Return True for each cell that occurs."""
    cells = np.zeros(NUM_CELLS, bool)
    cells[keys] = True
    return cells
