"""Pixel metrics of a histogram, with bounds over all orders of the scores inside a key (bin)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_clip.metrics.image import Ranking

__all__ = ["Bins", "Bounds"]

Bounds = dict[str, tuple[float, float]]
"""Lowest and highest possible value of each metric, by name."""


class Bins(NamedTuple):
    """Pixel counts of the occupied keys, from the highest score down."""

    anomalous: NDArray[np.int64]
    normal: NDArray[np.int64]
    regions: NDArray[np.float64]

    def ranking(self) -> Ranking:
        """Return the ranking of the pixels; pixels with the same key are tied."""
        occupied = self.anomalous > 0
        false_positives = self.normal.cumsum()
        return Ranking(
            tied=torch.from_numpy(self.anomalous[occupied]),
            above=torch.from_numpy((false_positives - self.normal)[occupied]),
            at_least=torch.from_numpy(false_positives[occupied]),
            num_normal=int(self.normal.sum()),
        )

    def pro(self, limit: float) -> float:
        """Return the normalised area under PRO up to a limit of the false positive rate."""
        share = self.regions / self.regions.sum()
        overlap = share.cumsum()
        width = self.normal / self.normal.sum()
        start = np.concatenate([[0.0], width.cumsum()[:-1]])
        inside = np.clip(limit - start, 0, width)
        # PRO rises linearly inside a key (trapezoids). The limit may cut a key into two parts.
        part = np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
        return float((inside * (overlap - share + share * part / 2)).sum() / limit)

    def bounds(self, limit: float) -> Bounds:
        """Return the lowest and highest value of each metric over all orders inside each key."""
        p, n = self.anomalous, self.normal
        true_positives, false_positives = p.cumsum(), n.cumsum()
        num_anomalous, num_normal = int(true_positives[-1]), int(false_positives[-1])
        ranking = self.ranking()
        area = ranking.auroc()
        slack = float((p * n.astype(np.float64)).sum()) / (2 * num_anomalous * num_normal)
        # Lowest: in each key, all normal pixels rank above the anomalous pixels. Highest: the
        # anomalous pixels, tied with each other, rank above all normal pixels.
        lowest = p * ((true_positives - p + 1) / (true_positives - p + 1 + false_positives))
        highest = p * (true_positives / np.maximum(true_positives + false_positives - n, 1))
        width = n / num_normal
        start = np.concatenate([[0.0], width.cumsum()[:-1]])
        share = self.regions / self.regions.sum()
        overlap = self.pro(limit)
        cut = np.where(start < limit, width, 0)
        doubt = float((share * cut).sum()) / (2 * limit)
        f1 = 2 * true_positives / (false_positives - n + true_positives + num_anomalous)
        bounds = {
            "pixel_auroc": (area - slack, area + slack),
            "pixel_ap": (float(lowest.sum()) / num_anomalous, float(highest.sum()) / num_anomalous),
            "pixel_f1_max": (ranking.f1_max(), float(f1.max())),
            "pixel_pro": (overlap - doubt, overlap + doubt),
        }
        return {name: (max(0.0, low), min(1.0, high)) for name, (low, high) in bounds.items()}
