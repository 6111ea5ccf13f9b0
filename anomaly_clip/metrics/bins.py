"""Pixel metrics of counts per interval of scores, with bounds over all orders inside the intervals.

A bin holds the numbers of anomalous and normal pixels whose scores lie in a closed interval, and
the sum of their region weights (one over the size of a pixel's region). Intervals may overlap,
because pixels of several batches and processes are counted in different bins. A bin whose ends are
equal is *exact*: its pixels are tied. In all other bins, the order of the pixels is unknown.

AUROC, F1-max and PRO rise, or stay equal, when an anomalous pixel moves up or a normal pixel moves
down. Their bounds are therefore reached if the anomalous pixels have the highest score of their bin
and the normal pixels the lowest, and the other way round. AP has bounds of its own, because a tie
can raise it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_clip.metric_values import Bounds
from anomaly_clip.metrics.image import Ranking
from anomaly_clip.metrics.pro import area_of_steps, bounds_of_steps

__all__ = ["CELLS", "Bins", "Ranked", "grouped", "joined", "rank_cells"]

CELLS = 512
"""A group holds at most about one pixel in this many of the pixels that rank at or above it. Our
choice: the metrics of groups are then certain to 1e-3."""


class Ranked(NamedTuple):
    """Pixel counts from the highest score down; the pixels of one entry are tied."""

    anomalous: NDArray[np.int64]
    normal: NDArray[np.int64]
    regions: NDArray[np.float64]

    def ranking(self) -> Ranking:
        """Return the ranking of the pixels."""
        occupied = self.anomalous > 0
        false_positives = self.normal.cumsum()
        return Ranking(
            tied=self.anomalous[occupied],
            above=(false_positives - self.normal)[occupied],
            at_least=false_positives[occupied],
            num_normal=int(self.normal.sum()),
        )

    def pro(self, limit: float) -> float:
        """Return the normalised area under PRO up to a limit of the false positive rate."""
        rate = self.normal.cumsum() / self.normal.sum()
        end = int(np.searchsorted(rate, limit)) + 1  # later entries lie beyond the limit
        share = self.regions[:end] / self.regions.sum()
        overlap = share.cumsum()
        start = np.concatenate([[0.0], rate[: end - 1]])
        width = rate[:end] - start
        inside = np.clip(limit - start, 0, width)
        # PRO rises linearly inside an entry (trapezoids). The limit may cut an entry in two.
        part = np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
        return float((inside * (overlap - share + share * part / 2)).sum() / limit)

    def metrics(self, exact: NDArray[np.bool_], limit: float) -> dict[str, float]:
        """Return the metrics, with PRO over all thresholds up to a false positive rate.

        In AP, the entries that are not exact count with the middle of their bounds, because the
        rule for ties biases AP low.
        """
        ranking = self.ranking()
        true_positives = self.anomalous.cumsum()
        tied = true_positives / np.maximum(true_positives + self.normal.cumsum(), 1)
        lowest, highest = self.precision_bounds()
        precision = np.where(exact, tied, (lowest + highest) / 2)
        return {
            "pixel_auroc": ranking.auroc(),
            "pixel_ap": float((self.anomalous * precision).sum()) / int(true_positives[-1]),
            "pixel_f1_max": ranking.f1_max(),
            "pixel_pro": self.pro(limit),
        }

    def precision_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lowest and the highest mean precision of the anomalous pixels of each entry.

        Lowest: all normal pixels of the entry rank above its anomalous pixels. Highest: the
        anomalous pixels, tied with each other, rank above its normal pixels.
        """
        p, n = self.anomalous, self.normal
        true_positives, false_positives = p.cumsum(), n.cumsum()
        first = true_positives - p + 1
        lowest = first / np.maximum(first + false_positives, 1)
        highest = true_positives / np.maximum(true_positives + false_positives - n, 1)
        return lowest, highest


class Bins(NamedTuple):
    """Pixel counts per interval of scores, in any order; ``(n,)`` each."""

    low: NDArray[np.float64]
    """Lowest score that a pixel of the bin can have."""
    high: NDArray[np.float64]
    """Highest score that a pixel of the bin can have."""
    anomalous: NDArray[np.int64]
    normal: NDArray[np.int64]
    regions: NDArray[np.float64]

    @classmethod
    def from_table(cls, table: Tensor) -> Bins:
        """Return the bins of a table from `table`."""
        low, high, anomalous, normal, regions = table.cpu().double().numpy().T.copy()
        return cls(low, high, anomalous.astype(np.int64), normal.astype(np.int64), regions)

    def table(self) -> Tensor:
        """Return the bins as float64 ``(n, 5)``, which holds counts below 2^53 exactly."""
        return torch.from_numpy(np.stack([column.astype(np.float64) for column in self], axis=1))

    @property
    def exact(self) -> NDArray[np.bool_]:
        """True for bins whose pixels are tied."""
        return self.low == self.high

    @property
    def total(self) -> NDArray[np.int64]:
        """Number of pixels of each bin."""
        return self.anomalous + self.normal

    def take(self, chosen: NDArray[np.int64]) -> Bins:
        """Return some of the bins, or all of them in another order."""
        return Bins._make(column[chosen] for column in self)

    def ranked(self) -> tuple[Ranked, NDArray[np.bool_]]:
        """Return the counts in the order of the bins' centres, and which of them are exact.

        The pixels of a bin count as tied at its centre.
        """
        order = np.argsort(-(self.low + self.high), kind="stable")
        bins = self.take(order)
        return Ranked(bins.anomalous, bins.normal, bins.regions), bins.exact

    def bounds(self, limit: float) -> Bounds:
        """Return the lowest and highest value of each metric over all orders inside the bins."""
        worst, best = self._extreme(best=False), self._extreme(best=True)
        least, most = worst.ranking(), best.ranking()
        return {
            "pixel_auroc": (least.auroc(), most.auroc()),
            "pixel_ap": self._average_precision_bounds(),
            "pixel_f1_max": (least.f1_max(), most.f1_max()),
            "pixel_pro": (worst.pro(limit), best.pro(limit)),
        }

    def _average_precision_bounds(self) -> tuple[float, float]:
        """Return the bounds of AP, from bounds of the precision at each anomalous pixel.

        AP does not always rise with an anomalous pixel: one that moves up out of a tie loses
        precision. The numbers of pixels that are surely, or possibly, at or above a pixel bound
        its precision in any order.
        """
        chosen = np.flatnonzero(self.anomalous)
        bins, p = self.take(chosen), self.anomalous[chosen]
        anomalous_above = _at_or_above(bins.low, p, bins.high)  # surely, without the bin itself
        anomalous_above -= np.where(bins.exact, p, 0)
        normal_above = _at_or_above(self.high, self.normal, bins.low)  # possibly
        # The j-th highest pixel of an inexact bin has at least j anomalous pixels at or above it.
        # The sum of its precisions exceeds the integral.
        start = np.maximum(anomalous_above + normal_above, 1)
        logarithm = np.log((anomalous_above + normal_above + p) / start)
        untied = np.where(normal_above > 0, p - normal_above * logarithm, p)
        tied = p * (anomalous_above + p) / np.maximum(anomalous_above + p + normal_above, 1)
        lowest = np.where(bins.exact, tied, untied)
        most_anomalous = _at_or_above(bins.high, p, bins.low)  # possibly
        least_normal = _at_or_above(self.low, self.normal, bins.high)  # surely
        highest = p * most_anomalous / np.maximum(most_anomalous + least_normal, 1)
        total = int(p.sum())
        return float(lowest.sum()) / total, float(highest.sum()) / total

    def _extreme(self, best: bool) -> Ranked:
        """Return the best or the worst order: AUROC, F1-max and PRO are highest or lowest in it.

        Exact bins stay whole. Of the inexact ones, all pixels of a class move to one end.
        """
        exact = self.exact
        anomalous = ~exact & (self.anomalous > 0)
        normal = ~exact & (self.normal > 0)
        ends = (self.high, self.low) if best else (self.low, self.high)
        groups = [
            (ends[0][anomalous], self.anomalous[anomalous], None, self.regions[anomalous]),
            (self.low[exact], self.anomalous[exact], self.normal[exact], self.regions[exact]),
            (ends[1][normal], None, self.normal[normal], None),
        ]
        if not best:  # among equal scores, the normal pixels then come first
            groups.reverse()
        value = np.concatenate([group[0] for group in groups])
        order = np.argsort(-value, kind="stable")
        columns: list[NDArray[Any]] = []
        for place in (1, 2, 3):
            dtype = np.float64 if place == 3 else np.int64
            parts = [np.zeros(len(g[0]), dtype) if g[place] is None else g[place] for g in groups]
            columns.append(np.concatenate(parts)[order])  # type: ignore[arg-type]
        return Ranked(*columns)

    def stepwise_pro(
        self, thresholds: NDArray[np.float64], limit: float
    ) -> tuple[float, tuple[float, float]]:
        """Return PRO over given thresholds, in ascending order, and its bounds; NaN if undefined.

        A threshold inside a bin splits the bin's pixels in proportion.
        """
        width = self.high - self.low
        weights = np.stack([self.normal / self.normal.sum(), self.regions / self.regions.sum()])
        # Fractions of normal pixels and of regions at or below each threshold, (2, thresholds).
        least = _fractions(self.high, weights, thresholds)
        most = _fractions(self.low, weights, thresholds)
        middle = least.copy()
        wide = np.flatnonzero(width > 0)
        low, width, weights = self.low[wide], width[wide], weights[:, wide]
        for place, threshold in enumerate(thresholds):
            part = (threshold - low) / width
            inside = np.flatnonzero((part >= 0) & (part < 1))
            middle[:, place] += weights[:, inside] @ part[inside]
        least, most, middle = (np.clip(1 - values, 0, 1) for values in (least, most, middle))
        area = area_of_steps(middle[0], middle[1], limit)
        return area, bounds_of_steps((most[0], least[0]), (most[1], least[1]), limit)


def _at_or_above(
    edges: NDArray[np.float64], counts: NDArray[np.int64], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the sum of the counts whose edge is at or above each threshold."""
    # A stable sort merges the ascending runs of both, faster than a binary search per threshold.
    # An edge that equals a threshold comes after it, so it is not below.
    order = np.argsort(np.concatenate([thresholds, edges]), kind="stable")
    below = np.empty(len(order), np.int64)
    below[order] = np.concatenate([np.zeros(len(thresholds), np.int64), counts])[order].cumsum()
    return int(counts.sum()) - below[: len(thresholds)]


def _fractions(
    edges: NDArray[np.float64], weights: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the sums of the weights whose edge is at or below each threshold."""
    order = np.argsort(edges, kind="stable")
    sums = np.concatenate([np.zeros((2, 1)), weights[:, order].cumsum(axis=1)], axis=1)
    return sums[:, np.searchsorted(edges[order], thresholds, side="right")]


def joined(parts: Iterable[Bins]) -> Bins:
    """Return the bins of all parts; bins with equal intervals become one."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    bins = Bins(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.argsort(bins.high, kind="stable")
    order = order[np.argsort(bins.low[order], kind="stable")]
    bins = bins.take(order)
    new = (np.diff(bins.low) > 0) | (np.diff(bins.high) > 0)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    if len(starts) == len(new) + 1 or not len(bins.low):
        return bins
    return Bins(
        bins.low[starts],
        bins.high[starts],
        *(np.add.reduceat(column, starts) for column in bins[2:]),
    )


def grouped(bins: Bins, cells: int = CELLS) -> Bins:
    """Return fewer bins: neighbours that together hold few of the pixels that rank above them.

    An exact bin that is too full for a group stays exact.

    Args:
        bins: Bins in any order.
        cells: A group holds about one in this many of the pixels that rank at or above it.
    """
    bins = bins.take(np.argsort(-(bins.low + bins.high), kind="stable"))
    total = bins.total
    above = total.cumsum() - total
    alone = bins.exact & (total * cells > above + total)
    cell = rank_cells(above, cells)
    new = (np.diff(cell) > 0) | alone[1:] | alone[:-1]
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    return Bins(
        np.minimum.reduceat(bins.low, starts),
        np.maximum.reduceat(bins.high, starts),
        *(np.add.reduceat(column, starts) for column in bins[2:]),
    )


def rank_cells(ranks: NDArray[np.int64], cells: int) -> NDArray[np.int64]:
    """Return the cell of each rank: single ranks at the top, then a constant fraction of the rank.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.metrics.bins import rank_cells
        >>> rank_cells(np.array([0, 1, 2, 3, 4, 6, 100]), 2).tolist()
        [0, 1, 2, 2, 3, 4, 9]
    """
    with np.errstate(divide="ignore"):
        later = cells + np.floor(np.log(ranks / cells) * cells)
    return np.where(ranks < cells, ranks, later).astype(np.int64)
