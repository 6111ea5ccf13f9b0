"""Pixel metrics in one pass over the maps, in memory that does not grow with their number.

The state of a category is a histogram of its scores: the number of all pixels, the number of
anomalous pixels, and, for PRO, the sum of region weights (one over the size of a pixel's region) in
each bin. AUROC, AP, F1-max and PRO are functions of these histograms, and two states merge by
addition of equal bins and union of others.

The bins follow the scores, whatever their range and offset: :mod:`~anomaly_clip.metrics.windows`
places them. Scores in half precision have a bin each, so their metrics are exact. In the other
bins, only the order of the pixels inside a bin is lost. The metrics therefore come with bounds over
all such orders, which hold for the float32 scores as given.

In bins from the highest score down, let ``p``, ``n`` and ``w`` be the anomalous pixels, normal
pixels and region weights of a bin, ``TP``, ``FP`` and ``PRO`` their running sums including the bin
(``PRO`` as a fraction), and ``P`` and ``N`` all anomalous and normal pixels:

- AUROC = sum of ``(TP - p / 2) n / (P N)``;
- AP = sum of ``p / P * TP / (TP + FP)``; for a bin with several scores, the middle of its bounds
  counts instead, because the rule for ties biases AP low;
- F1-max = maximum of ``2 TP / (TP + FP + P)``;
- PRO up to a false positive rate ``L``: trapezoids of ``PRO`` over ``FP / N``, cut at ``L``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from anomaly_clip.metric_values import PIXEL_METRICS, Bounds, Curves
from anomaly_clip.metrics.bins import CELLS, Bins, grouped, joined
from anomaly_clip.metrics.curves import pixel_curves
from anomaly_clip.metrics.pro import (
    check_pro_options,
    region_weights,
    step_thresholds,
)
from anomaly_clip.metrics.windows import (
    CHUNK,
    FEW,
    NUM_BINS,
    HalfWindow,
    LinearWindow,
    Pixels,
    Window,
    separated,
)

__all__ = [
    "Defects",
    "PixelHistogram",
    "PixelResult",
    "check_pixels",
    "concatenated",
    "defects_of",
    "gather_any",
    "image_extremes",
    "weights_of",
]

ROUNDING = 1e-12
"""Rounding error of sums in double precision; bounds are widened by it."""
DEVICE_CHUNK = 1 << 25
"""Number of pixels converted at once on a GPU, where kernel launches cost more than the memory of
temporary keys (12 bytes per pixel)."""
MAX_WINDOWS = 3
"""Number of windows of a row."""
ENOUGH = 8
"""A batch opens another window if the others leave more than one in this many of its pixels."""
WINDOW_SIZES = {False: (NUM_BINS, CELLS), True: (1 << 20, 16 * CELLS)}
"""Number of bins of a window, and the share of a crowded bin, without and with ``fine``."""
MAX_SEPARATE = {False: 1 << 16, True: 1 << 19}
"""Number of bins of a row outside of windows, without and with ``fine``."""


class PixelResult:
    """Metrics, bounds and curves of one row, that is, of one of the separate evaluations.

    Not a tuple or a data class: torchmetrics would search these for tensors, number by number.

    Args:
        metrics: Metric values by the names of `PIXEL_METRICS`; None if undefined (a single class).
        bounds: Certified bounds; empty if the metrics are exact.
        curves: Curves of the metrics; empty if undefined.
    """

    def __init__(
        self, metrics: dict[str, float | None], bounds: Bounds, curves: Curves | None = None
    ) -> None:
        self.metrics = metrics
        self.bounds = bounds
        self.curves = curves or {}

    def __iter__(self) -> Iterator[Any]:
        """Return metrics, bounds and curves, in this order."""
        return iter((self.metrics, self.bounds, self.curves))

    def __eq__(self, other: object) -> bool:
        """Return True if metrics, bounds and curves are equal."""
        return isinstance(other, PixelResult) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


class Defects(NamedTuple):
    """The anomalous pixels of a mask, on the CPU."""

    places: NDArray[np.int64]
    """Flat indices ``(d,)``."""
    weights: NDArray[np.float64]
    """One over the size of the region of each pixel, ``(d,)``."""


class PixelHistogram(Metric):
    """Count pixels in bins of their scores, in one row per category.

    A row takes 0.8 MiB in the usual case, whatever the number of images, and at most 5 MiB per
    process: three windows and 65,536 separate bins. Maps in half precision add 1.5 MiB per type.

    Args:
        num_rows: Number of separate evaluations.
        fine: Use windows of 2^20 bins instead of 2^15, for narrower bounds: 25 MiB per row in the
            usual case, and at most 95 MiB per process.
        fpr_limit: False positive rate up to which PRO is integrated.
        pro_steps: None: PRO over all thresholds. A number: PRO over that many equally spaced
            thresholds; a threshold inside a bin splits the bin's pixels in proportion.

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
        for row in range(num_rows):
            self.add_state(f"bins_{row}", [], dist_reduce_fx="cat")
        # The negated lowest score and the highest score, so that both merge by maximum.
        worst = torch.full((num_rows, 2), -math.inf, dtype=torch.float64)
        self.add_state("extremes", worst, dist_reduce_fx="max")
        self._clear_windows()

    def reset(self) -> None:
        """Forget all pixels."""
        with torch.inference_mode(False):  # a later update may run outside of this mode
            super().reset()
        self._clear_windows()

    def _clear_windows(self) -> None:
        self._linear: list[list[LinearWindow]] = [[] for _ in range(self.num_rows)]
        self._half: dict[tuple[int, torch.dtype], HalfWindow] = {}

    def _flush(self) -> None:
        """Move the counts of the windows to the state, which can be merged."""
        for row in range(self.num_rows):
            for window in self._windows(row):
                bins = window.bins()
                if len(bins.low):
                    self._separate(row).append(bins.table())
                    window.clear()
            self._shrink(row)

    def _windows(self, row: int) -> list[Window]:
        half = [window for (of, _), window in self._half.items() if of == row]
        return [*self._linear[row], *half]

    def _separate(self, row: int) -> list[Tensor]:
        state: list[Tensor] = getattr(self, f"bins_{row}")
        return state

    def _copy_state_dict(self) -> dict[str, Any]:
        """Copy the state, as torchmetrics does before it synchronises or replaces it."""
        self._flush()
        return super()._copy_state_dict()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the pixels of another metric."""
        self._flush()
        if isinstance(incoming_state, PixelHistogram):
            incoming_state._flush()
        super().merge_state(incoming_state)
        self._flush()

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Collect the bins of all processes; those with equal edges are added when computing."""
        extremes = self.extremes.clone()
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=process_group)
        self.extremes = extremes
        mine = [self._separate(row) for row in range(self.num_rows)]
        gathered: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(gathered, mine, process_group)
        for row in range(self.num_rows):
            setattr(self, f"bins_{row}", [table for tables in gathered for table in tables[row]])

    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        rows: Tensor | None = None,
        names: Sequence[str] | None = None,
        defects: Sequence[Defects] | None = None,
    ) -> None:
        """Add images.

        Args:
            maps: Floating ``(B, h, w)``; higher = more anomalous. Double precision is rounded to
                float32.
            masks: bool ``(B, h, w)``, on any device; best on the CPU, which labels their regions.
            rows: int64 ``(B,)``, row of each image; default: the first row.
            names: Names of the images in error messages.
            defects: The result of :func:`defects_of`, if it is available.

        Raises:
            ValueError: If shapes or types do not match, or a score is not finite. Nothing of the
                batch is counted then.
        """
        rows = check_pixels(maps, masks, rows, self.num_rows)
        maps = maps.detach().float() if maps.dtype == torch.float64 else maps.detach()
        if not maps.numel():
            return
        defects = defects_of(masks) if defects is None else defects
        extremes = image_extremes(maps, names)
        for row in sorted(set(rows.tolist())):
            chosen = (rows == row).nonzero().squeeze(1)
            some = maps if len(chosen) == len(rows) else maps[chosen.to(maps.device)]
            of_row = [defects[place] for place in chosen.tolist()]
            self._add(row, some, of_row, extremes[chosen.numpy()])

    def _add(
        self, row: int, maps: Tensor, defects: Sequence[Defects], extremes: NDArray[np.float64]
    ) -> None:
        most = CHUNK if maps.device.type == "cpu" else DEVICE_CHUNK
        step = max(1, most // maps[0].numel())
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            low, high = float(extremes[part, 0].min()), float(extremes[part, 1].max())
            if self.pro_steps is not None:
                worst = torch.tensor([-low, high]).to(self.extremes)
                self.extremes[row] = self.extremes[row].maximum(worst)
            pixels = pixels_of(maps[part], defects[part], (low, high))
            if maps.dtype == torch.float32:
                self._count(row, pixels)
            else:
                window = self._half.setdefault((row, maps.dtype), HalfWindow(maps.dtype))
                window.count(pixels)

    def _count(self, row: int, pixels: Pixels) -> None:
        """Count float32 pixels in the windows of a row, and the others in separate bins."""
        num_pixels = len(pixels.scores)
        rest: Pixels | None = pixels
        windows = self._linear[row] if num_pixels > FEW else []
        for window in windows:
            if rest is not None:
                rest = window.count(rest)
        while (
            rest is not None
            and num_pixels > FEW
            and len(rest.scores) * ENOUGH > num_pixels
            and len(windows) < MAX_WINDOWS
        ):
            new = LinearWindow.around(*rest.range(), *WINDOW_SIZES[self.fine])
            if any(new.same_bins(window) for window in windows):
                break
            windows.append(new)
            rest = new.count(rest)
        if rest is not None:
            cells = WINDOW_SIZES[self.fine][1]
            self._separate(row).append(separated(rest.cpu(), cells).table())
            self._shrink(row)

    def _shrink(self, row: int) -> None:
        """Merge separate bins if there are too many, those with the fewest pixels first."""
        tables, most = self._separate(row), MAX_SEPARATE[self.fine]
        while len(tables) > 1 and sum(map(len, tables)) > most:
            tables.sort(key=lambda table: float(table[:, 2:4].sum()), reverse=True)
            pair = joined([Bins.from_table(tables.pop()), Bins.from_table(tables.pop())])
            if len(pair.low) > most // 4:
                pair = grouped(pair, WINDOW_SIZES[self.fine][1])
            tables.append(pair.table())

    def compute(self) -> list[PixelResult]:
        """Return the metrics of all rows."""
        return [self._row_result(row) for row in range(self.num_rows)]

    def _row_result(self, row: int) -> PixelResult:
        parts = [bins for window in self._windows(row) if len((bins := window.bins()).low)]
        parts += [Bins.from_table(table) for table in self._separate(row)]
        metrics: dict[str, float | None] = dict.fromkeys(PIXEL_METRICS)
        if not parts:
            return PixelResult(metrics, {})
        bins = joined(parts)
        if not bins.anomalous.any() or not bins.normal.any():
            return PixelResult(metrics, {})
        ranked, exact = bins.ranked()
        values = ranked.metrics(exact, self.fpr_limit)
        bounds = {} if exact.all() else bins.bounds(self.fpr_limit)
        if self.pro_steps is not None:
            low, high = -float(self.extremes[row, 0]), float(self.extremes[row, 1])
            thresholds = step_thresholds(low, high, self.pro_steps)
            area, ends = (
                bins.stepwise_pro(thresholds, self.fpr_limit) if high > low else (math.nan, (0, 1))
            )
            values["pixel_pro"] = area
            bounds |= {"pixel_pro": ends} if bounds else {}
        for name, value in values.items():
            if math.isnan(value):
                bounds.pop(name, None)
                continue
            low, high = bounds.get(name, (value, value))
            metrics[name] = min(max(value, low), high)
        wider = {
            k: (max(0.0, a - ROUNDING), min(1.0, b + ROUNDING)) for k, (a, b) in bounds.items()
        }
        return PixelResult(metrics, wider, pixel_curves(*ranked, fpr_limit=self.fpr_limit))


def pixels_of(maps: Tensor, defects: Sequence[Defects], extremes: tuple[float, float]) -> Pixels:
    """Return the pixels of maps ``(B, h, w)``; scores in half precision by their patterns."""
    half = maps.dtype != torch.float32
    maps = maps.contiguous().view(torch.int16) if half else maps.contiguous()
    if maps.device.type != "cpu":
        return pixels_on_device(maps.int() & 0xFFFF if half else maps, defects, extremes)
    values = maps.numpy().view(np.uint16) if half else maps.numpy()
    pairs = zip(values, defects, strict=True)
    hit = [image.reshape(-1).take(mask.places) for image, mask in pairs]
    return Pixels(values.reshape(-1), np.concatenate(hit), weights_of(defects), extremes)


def pixels_on_device(
    maps: Tensor, defects: Sequence[Defects], extremes: tuple[float, float]
) -> Pixels:
    """Return the pixels of maps whose scores stay on their device; see :func:`pixels_of`."""
    starts = range(0, maps.numel(), maps[0].numel())
    flat = [mask.places + start for mask, start in zip(defects, starts, strict=True)]
    chosen = torch.from_numpy(np.concatenate(flat)).to(maps.device)
    scores = maps.flatten()
    return Pixels(scores, scores[chosen].cpu().numpy(), weights_of(defects), extremes)


def defects_of(masks: Tensor) -> list[Defects]:
    """Return the anomalous pixels of masks ``(B, h, w)``, for each mask.

    This needs no scores. So it comes first, as a device may still be computing them.
    """
    defects = []
    for mask in masks.cpu().numpy():
        places = np.flatnonzero(mask)
        defects.append(Defects(places, region_weights(mask, places)))
    return defects


def weights_of(defects: Sequence[Defects]) -> NDArray[np.float64]:
    """Return the region weights of the anomalous pixels of all masks."""
    return np.concatenate([np.zeros(0), *(mask.weights for mask in defects)])


def check_pixels(maps: Tensor, masks: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Check the form of a batch of pixels and return the rows of its images on the CPU.

    Raises:
        ValueError: If shapes or types do not match.
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


def image_extremes(maps: Tensor, names: Sequence[str] | None) -> NDArray[np.float64]:
    """Return the lowest and the highest score of each map, ``(B, 2)``.

    Raises:
        ValueError: If a score is not finite.
    """
    if maps.device.type == "cpu" and maps.dtype == torch.float32:
        # numpy's two vectorised passes, the second of which reads the cache, beat torch's one.
        extremes = np.array([(image.min(), image.max()) for image in maps.numpy()], np.float64)
    elif maps.device.type == "cpu":  # twice as fast as along an axis
        extremes = np.stack([torch.stack(image.aminmax()).double().numpy() for image in maps])
    else:
        lowest, highest = maps.flatten(1).aminmax(dim=1)
        extremes = torch.stack([lowest, highest], dim=1).double().cpu().numpy()
    wrong = np.flatnonzero(~np.isfinite(extremes).all(axis=1))
    if len(wrong):
        name = f"map {wrong[0]} of the batch" if names is None else names[wrong[0]]
        raise ValueError(
            f"metrics: {name} has a score that is NaN or infinite: try trainer.precision 32-true, "
            "or fit again with a lower learning rate"
        )
    return extremes


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
