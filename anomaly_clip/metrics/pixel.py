"""Pixel metrics in one pass over the maps, in memory that does not grow with their number.

The state has three histograms over a 16-bit *key* of the score: the number of all pixels, the
number of anomalous pixels, and, for PRO, the sum of region weights (one over the size of a pixel's
region). AUROC, AP, F1-max and PRO are functions of these histograms, and two states merge by
addition.

The key of a score is its bit pattern in half precision. Keys are in the order of the scores (in
reverse order for negative scores), so metrics of half-precision scores are exact. float32 scores
are rounded to float16 for the key, and pixels that share a key count as tied. Only the order of the
scores inside a key is lost. The metrics therefore come with bounds over all such orders, which hold
for the unrounded scores.

In bins from the highest score down, let ``p``, ``n`` and ``w`` be the anomalous pixels, normal
pixels and region weights of a bin, ``TP``, ``FP`` and ``PRO`` their running sums including the bin
(``PRO`` as a fraction), and ``P`` and ``N`` all anomalous and normal pixels:

- AUROC = sum of ``(TP - p / 2) n / (P N)``;
- AP = sum of ``p / P * TP / (TP + FP)``; for rounded scores, the middle of its bounds is reported
  instead, because the rule for ties biases AP low;
- F1-max = maximum of ``2 TP / (TP + FP + P)``;
- PRO up to a false positive rate ``L``: trapezoids of ``PRO`` over ``FP / N``, cut at ``L``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.metrics.bins import Bins, Bounds
from anomaly_clip.metrics.curves import Curves, pixel_curves, sampled_counts
from anomaly_clip.metrics.image import as_array, is_finite, rank_sorted
from anomaly_clip.metrics.keys import (
    BFLOAT16,
    CHUNK,
    DEVICE_CHUNK,
    FINE,
    FLOAT16,
    KEY_KINDS,
    count_keys,
    count_with_opencv,
    defect_weights,
    key_edges,
    key_order,
    key_values,
    with_one_zero,
)
from anomaly_clip.metrics.pro import (
    area_of_steps,
    area_under_pro,
    bounds_of_steps,
    check_pro_options,
    in_order,
    step_thresholds,
)
from anomaly_clip.progress import track

__all__ = [
    "PIXEL_METRICS",
    "Bounds",
    "PixelHistogram",
    "PixelRanking",
    "PixelResult",
    "concatenated",
    "gather_any",
]

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_pro")

ROUNDING = 1e-12
"""Rounding error of sums in double precision; bounds are widened by it."""


class PixelResult(NamedTuple):
    """Metrics of one row, that is, of one of the separate evaluations."""

    metrics: dict[str, float | None]
    """Metric values by the names of `PIXEL_METRICS`; None if undefined (a single class)."""
    bounds: Bounds
    """Certified bounds; empty if the metrics are exact."""
    curves: Curves = MappingProxyType({})
    """Curves of the metrics; empty if undefined."""


class PixelHistogram(Metric):
    """Count pixels by the key of their score, in one row per category.

    The state is three histograms per row: 1.5 MiB, whatever the number of images.

    Args:
        num_rows: Number of separate evaluations.
        fine: Use keys of 20 bits (sign, 6 bits of exponent, 13 of mantissa) instead of 16, for
            float32 scores. Bounds are about ten times narrower, and the state has 24 MiB per row.
        fpr_limit: False positive rate up to which PRO is integrated.
        pro_steps: None: PRO over all keys. A number: PRO over that many equally spaced thresholds;
            a threshold inside a key splits the key's pixels in proportion.

    Example:
        >>> import torch
        >>> from anomaly_clip.metrics import PixelHistogram
        >>> maps = torch.tensor([[[0.9, 0.2], [0.1, 0.3]]])
        >>> metric = PixelHistogram()
        >>> metric.update(maps, maps > 0.5)
        >>> values, bounds, curves = metric.compute()[0]
        >>> values["pixel_auroc"]
        1.0
    """

    full_state_update = False
    counts: Tensor
    positives: Tensor
    regions: Tensor
    kinds: Tensor
    rounded: Tensor
    extremes: Tensor

    def __init__(
        self,
        num_rows: int = 1,
        *,
        fine: bool = False,
        fpr_limit: float = 0.3,
        pro_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_pro_options(fpr_limit, pro_steps)
        self.num_rows = num_rows
        self.fine = fine
        self.fpr_limit = fpr_limit
        self.pro_steps = pro_steps
        self.num_keys = 1 << (20 if fine else 16)
        for name in ("counts", "positives", "regions"):
            dtype = torch.float64 if name == "regions" else torch.int64
            self._add_zeros(name, (num_rows, self.num_keys), dtype)
        # Number of pixels per kind of key, and number of pixels per row that the key has rounded.
        self._add_zeros("kinds", (len(KEY_KINDS),), torch.int64)
        self._add_zeros("rounded", (num_rows,), torch.int64)
        # The negated lowest score and the highest score, so that both merge by maximum.
        worst = torch.full((num_rows, 2), -math.inf, dtype=torch.float64)
        self.add_state("extremes", worst, dist_reduce_fx="max")

    def _add_zeros(self, name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
        self.add_state(name, torch.zeros(size, dtype=dtype), dist_reduce_fx="sum")
        # torchmetrics keeps a default for each state; an expanded tensor stores a single zero.
        self._defaults[name] = torch.zeros(1, dtype=dtype).expand(size)

    def reset(self) -> None:
        """Forget all pixels."""
        with torch.inference_mode(False):  # a later update may run outside of this mode
            super().reset()

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Add up the states of all processes with one all-reduce each, without gathering them."""
        for name in self._defaults:
            state = getattr(self, name).clone()
            how = dist.ReduceOp.MAX if name == "extremes" else dist.ReduceOp.SUM
            dist.all_reduce(state, how, group=process_group)
            setattr(self, name, state)

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        rows: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Add images.

        Args:
            maps: Floating ``(B, h, w)``; higher = more anomalous.
            masks: bool ``(B, h, w)``.
            rows: int64 ``(B,)``, row of each image; default: the first row.
            names: Names of the images in error messages.

        Raises:
            ValueError: If shapes or types do not match, or a score is not finite. Nothing of the
                batch is counted then.
        """
        rows = check_pixels(maps, masks, rows, self.num_rows, names)
        if not maps.numel():
            return
        kind = FINE if self.fine else BFLOAT16 if maps.dtype == torch.bfloat16 else FLOAT16
        maps = maps.detach()
        for row in rows.unique().tolist():
            chosen = (rows == row).nonzero().squeeze(1)
            same = slice(None) if len(chosen) == len(rows) else chosen.to(maps.device)
            self._add(row, maps[same], masks[same], kind)
        self.kinds[KEY_KINDS.index(kind)] += maps.numel()

    def _add(self, row: int, maps: Tensor, masks: Tensor, kind: int) -> None:
        on_cpu = maps.device.type == "cpu" and kind != FINE
        histograms = count_with_opencv if on_cpu else count_keys
        most = CHUNK if maps.device.type == "cpu" else DEVICE_CHUNK
        step = max(1, most // maps[0].numel())
        for start in range(0, len(maps), step):
            part, mask = maps[start : start + step], masks[start : start + step]
            counts, positives, regions = histograms(part, mask, kind, self.num_keys)
            self.counts[row] += counts.to(self.counts.device)
            if positives is not None and regions is not None:
                self.positives[row] += positives.to(self.positives.device)
                self.regions[row] += regions.to(self.regions.device)
            if self.pro_steps is not None:
                low, high = part.aminmax()
                extremes = torch.stack([-low, high]).to(self.extremes)
                self.extremes[row] = self.extremes[row].maximum(extremes)
        # A fine key covers the mantissa of half precision, but not all exponents of bfloat16.
        exact = (torch.float16,) if self.fine else (torch.float16, torch.bfloat16)
        if maps.dtype not in exact:
            self.rounded[row] += maps.numel()

    @property
    def kind(self) -> int:
        """Kind of the keys.

        Raises:
            ValueError: If keys of two kinds were counted, by one process or by several.
        """
        counted = [
            kind for kind, count in zip(KEY_KINDS, self.kinds.tolist(), strict=True) if count
        ]
        if len(counted) > 1:
            raise ValueError(
                "PixelHistogram: bfloat16 scores and others cannot be counted together, got "
                f"{self.kinds.tolist()} pixels with float16, bfloat16 and fine keys: convert all "
                "maps to one type"
            )
        return counted[0] if counted else KEY_KINDS[0]

    def compute(self) -> list[PixelResult]:
        """Return the metrics of all rows."""
        return [self._row_result(row) for row in range(self.num_rows)]

    def _row_result(self, row: int) -> PixelResult:
        order, kind = key_order(self.num_keys), self.kind
        counts, positives, regions = (
            with_one_zero(state[row].cpu().numpy(), self.fine)[order]
            for state in (self.counts, self.positives, self.regions)
        )
        occupied = np.flatnonzero(counts)[::-1]  # from the highest score down
        bins = Bins(
            anomalous=positives[occupied],
            normal=(counts - positives)[occupied],
            regions=regions[occupied],
        )
        metrics: dict[str, float | None] = dict.fromkeys(PIXEL_METRICS)
        ranking = bins.ranking()
        if not ranking.defined:
            return PixelResult(metrics, {})
        curves = pixel_curves(*bins, fpr_limit=self.fpr_limit)
        exact = not int(self.rounded[row])
        bounds = bins.bounds(self.fpr_limit)
        metrics["pixel_auroc"] = ranking.auroc()
        metrics["pixel_ap"] = ranking.average_precision() if exact else sum(bounds["pixel_ap"]) / 2
        metrics["pixel_f1_max"] = ranking.f1_max()
        if self.pro_steps is None:
            metrics["pixel_pro"] = bins.pro(self.fpr_limit)
        else:
            del bounds["pixel_pro"]
            stepwise = self._stepwise_pro(row, order[occupied[::-1]], kind, bins, exact)
            if stepwise is not None:
                metrics["pixel_pro"], bounds["pixel_pro"] = stepwise
        if exact:
            return PixelResult(metrics, {}, curves)
        wider = {
            k: (max(0.0, a - ROUNDING), min(1.0, b + ROUNDING)) for k, (a, b) in bounds.items()
        }
        return PixelResult(metrics, wider, curves)

    def _stepwise_pro(
        self, row: int, keys: NDArray[np.int64], kind: int, bins: Bins, exact: bool
    ) -> tuple[float, tuple[float, float]] | None:
        """Return PRO and its bounds over equally spaced thresholds, given the occupied ``keys``."""
        assert self.pro_steps is not None
        low, high = -float(self.extremes[row, 0]), float(self.extremes[row, 1])
        if high <= low:
            return None
        thresholds = step_thresholds(low, high, self.pro_steps)
        # Fractions of the pixels up to the end of each occupied key, from the lowest score up.
        shares = [
            np.concatenate([[0.0], values[::-1].cumsum() / values.sum()])
            for values in (bins.normal, bins.regions)
        ]
        if exact:
            number = np.searchsorted(key_values(keys, kind), thresholds, side="right")
            fpr, overlap = (1 - share[number] for share in shares)
            area = area_of_steps(fpr, overlap, self.fpr_limit)
            return None if math.isnan(area) else (area, (area, area))
        # A key represents the scores between two edges; a threshold may lie between them.
        starts, ends = np.clip(key_edges(keys, kind), low, high)
        least = np.searchsorted(ends, thresholds, side="right")  # whole keys up to the threshold
        most = np.maximum(np.searchsorted(starts, thresholds, side="right"), least)
        inside = np.divide(
            thresholds - starts[np.minimum(least, len(starts) - 1)],
            (ends - starts)[np.minimum(least, len(starts) - 1)],
            out=np.zeros_like(thresholds),
            where=most > least,
        )
        fpr, overlap = (
            1 - (share[least] + np.clip(inside, 0, 1) * (share[most] - share[least]))
            for share in shares
        )
        area = area_of_steps(fpr, overlap, self.fpr_limit)
        if math.isnan(area):
            return None
        between = [(1 - share[most], 1 - share[least]) for share in shares]
        return area, bounds_of_steps(between[0], between[1], self.fpr_limit)


class PixelRanking(Metric):
    """Keep the scores of all pixels and rank them exactly, in at most 12 bytes per pixel.

    Args:
        num_rows: Number of separate evaluations.
        fpr_limit: False positive rate up to which PRO is integrated.
        pro_steps: None: exact PRO. A number: PRO over that many equally spaced thresholds.
    """

    full_state_update = False

    def __init__(
        self, num_rows: int = 1, *, fpr_limit: float = 0.3, pro_steps: int | None = None
    ) -> None:
        super().__init__(dist_sync_fn=gather_any, compute_on_cpu=True)
        check_pro_options(fpr_limit, pro_steps)
        self.num_rows = num_rows
        self.fpr_limit = fpr_limit
        self.pro_steps = pro_steps
        for row in range(num_rows):
            for name in ("scores", "defect", "weight"):
                self.add_state(f"{name}_{row}", [], dist_reduce_fx="cat")

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        rows: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Add images; see :meth:`PixelHistogram.update`."""
        rows = check_pixels(maps, masks, rows, self.num_rows, names)
        maps, masks = maps.detach().cpu(), masks.cpu()
        for row in rows.unique().tolist():
            chosen = (rows == row).nonzero().squeeze(1)
            # Indexing copies the images, so that the rest of the batch is not kept alive.
            scores, mask = maps[chosen], masks[chosen].numpy()  # (b, h, w) each
            self._state("scores", row).append(scores.flatten())
            hit = [values[m] for values, m in zip(scores, mask, strict=True) if m.any()]
            weights = defect_weights(mask)
            if weights is not None:
                self._state("defect", row).append(torch.cat(hit))
                self._state("weight", row).append(torch.from_numpy(weights))

    def compute(self) -> list[PixelResult]:
        """Return the metrics of all rows."""
        return [self._row_result(row) for row in track(range(self.num_rows), "pixel metrics")]

    def _row_result(self, row: int) -> PixelResult:
        metrics: dict[str, float | None] = dict.fromkeys(PIXEL_METRICS)
        scores, defect, weight = (
            concatenated(self._state(name, row)) for name in ("scores", "defect", "weight")
        )
        if not 0 < len(defect) < len(scores):
            return PixelResult(metrics, {})
        ordered = as_array(scores)
        ordered.sort()
        hit, weights = in_order(as_array(defect), weight.numpy())
        del defect, weight
        ranking = rank_sorted(ordered, hit)
        overlap = area_under_pro(ordered, hit, weights, self.fpr_limit, self.pro_steps, ranking)
        values = (ranking.auroc(), ranking.average_precision(), ranking.f1_max(), overlap)
        for name, value in zip(PIXEL_METRICS, values, strict=True):
            metrics[name] = None if math.isnan(value) else value
        curves = pixel_curves(*sampled_counts(ordered, hit, weights), fpr_limit=self.fpr_limit)
        return PixelResult(metrics, {}, curves)

    def _state(self, name: str, row: int) -> list[Tensor]:
        state: list[Tensor] = getattr(self, f"{name}_{row}")
        return state


def check_pixels(
    maps: Tensor,
    masks: Tensor,
    rows: Tensor | None,
    num_rows: int,
    names: Sequence[str] | None,
) -> Tensor:
    """Check a batch of pixels and return the rows of its images on the CPU.

    Raises:
        ValueError: If shapes or types do not match, or a score is not finite.
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"metrics: expected maps (B, h, w) and masks of the same shape, got "
            f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        )
    if not maps.is_floating_point() or masks.dtype != torch.bool:
        raise ValueError(
            f"metrics: expected floating maps and bool masks, got {maps.dtype} and {masks.dtype}"
        )
    if not is_finite(maps):
        wrong = next(i for i, scores in enumerate(maps) if not is_finite(scores))
        name = f"map {wrong} of the batch" if names is None else names[wrong]
        raise ValueError(
            f"metrics: {name} has a score that is NaN or infinite: try trainer.precision 32-true, "
            "or fit again with a lower learning rate"
        )
    if rows is None:
        return torch.zeros(len(maps), dtype=torch.int64)
    rows = rows.cpu()
    if rows.shape != (len(maps),) or rows.dtype != torch.int64:
        raise ValueError(
            f"metrics: expected rows int64 ({len(maps)},), got {rows.dtype} {tuple(rows.shape)}"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise ValueError(f"metrics: rows must be in 0 to {num_rows - 1}, got {rows.tolist()}")
    return rows


def gather_any(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather tensors of any shape and type from all ranks, and drop empty tensors.

    torchmetrics' own gathering requires equal types and numbers of axes, which a rank that saw no
    image cannot know.
    """
    gathered: list[Tensor] = [tensor] * dist.get_world_size(group)
    dist.all_gather_object(gathered, tensor.cpu(), group)
    kept = [part for part in gathered if part.ndim == 0 or part.shape[0]]
    return [part.to(tensor.device) for part in kept or [tensor]]


def concatenated(state: list[Tensor] | Tensor) -> Tensor:
    """Return a state as one tensor; torchmetrics keeps it as a list until it is synchronised."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0)
