"""Pixel metrics of all scores as given: each pixel is kept, and anomalous pixels are ranked exactly.

AUROC, AP, F1-max and PRO depend only on the numbers of normal pixels above, and at or above, the
score of each anomalous pixel. :mod:`~anomaly_clip.metrics.counts` finds these numbers without
sorting all scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.metrics.counts import normal_counts
from anomaly_clip.metrics.curves import pixel_curves, sampled_counts
from anomaly_clip.metrics.image import Ranking, as_array
from anomaly_clip.metrics.pixel import (
    PIXEL_METRICS,
    PixelResult,
    anomalous_places,
    check_pixels,
    concatenated,
    gather_any,
    image_extremes,
)
from anomaly_clip.metrics.pro import (
    area_of_ranking,
    area_of_steps,
    check_pro_options,
    in_order,
    rounded_down,
    step_thresholds,
)
from anomaly_clip.progress import track

__all__ = ["PixelRanking"]


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
    ) -> None:
        """Add images; see :meth:`PixelHistogram.update`."""
        rows = check_pixels(maps, masks, rows, self.num_rows)
        if not maps.numel():
            return
        extremes = image_extremes(maps, names)
        scores, mask = as_array(maps), masks.cpu().numpy()
        for row in sorted(set(rows.tolist())):
            chosen = np.flatnonzero(rows.numpy() == row)
            normal = scores[chosen]  # a copy, whose anomalous pixels are taken out
            places, weights = anomalous_places(mask[chosen])
            defect = []
            for image, at in zip(normal.reshape(len(chosen), -1), places, strict=True):
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
