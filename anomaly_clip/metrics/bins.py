"""Pixel figures of a histogram, and how far any order inside its keys could move them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_clip.metrics.image import Ranking

__all__ = ["Bins", "Bounds"]

Bounds = dict[str, tuple[float, float]]
"""The lowest and the highest value a figure can have, by name."""


class Bins(NamedTuple):
    """Occupied keys, from the highest score down."""

    anomalous: NDArray[np.int64]
    normal: NDArray[np.int64]
    regions: NDArray[np.float64]

    def ranking(self) -> Ranking:
        """Return the ranking of the pixels, all of a key being tied."""
        some = self.anomalous > 0
        false = self.normal.cumsum()
        return Ranking(
            tied=torch.from_numpy(self.anomalous[some]),
            above=torch.from_numpy((false - self.normal)[some]),
            at_least=torch.from_numpy(false[some]),
            num_normal=int(self.normal.sum()),
        )

    def pro(self, limit: float) -> float:
        """Return the area under PRO up to a false positive rate, by trapezoids."""
        share = self.regions / self.regions.sum()
        overlap = share.cumsum()
        width = self.normal / self.normal.sum()
        start = np.concatenate([[0.0], width.cumsum()[:-1]])
        inside = np.clip(limit - start, 0, width)
        # Inside a key PRO rises linearly; of the last one only a part is below the limit.
        part = np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
        return float((inside * (overlap - share + share * part / 2)).sum() / limit)

    def bounds(self, limit: float) -> Bounds:
        """Return the lowest and the highest value of each figure for any order inside the keys."""
        p, n = self.anomalous, self.normal
        true_positives, false_positives = p.cumsum(), n.cumsum()
        num_found, num_normal = int(true_positives[-1]), int(false_positives[-1])
        ranking = self.ranking()
        area = ranking.auroc()
        slack = float((p * n.astype(np.float64)).sum()) / (2 * num_found * num_normal)
        # The first of a key's anomalous pixels behind all its normal ones; all before them, tied.
        lowest = p * ((true_positives - p + 1) / (true_positives - p + 1 + false_positives))
        highest = p * (true_positives / np.maximum(true_positives + false_positives - n, 1))
        width = n / num_normal
        start = np.concatenate([[0.0], width.cumsum()[:-1]])
        share = self.regions / self.regions.sum()
        overlap = self.pro(limit)
        cut = np.where(start < limit, width, 0)
        doubt = float((share * cut).sum()) / (2 * limit)
        f1 = 2 * true_positives / (false_positives - n + true_positives + num_found)
        bounds = {
            "pixel_auroc": (area - slack, area + slack),
            "pixel_ap": (float(lowest.sum()) / num_found, float(highest.sum()) / num_found),
            "pixel_f1_max": (ranking.f1_max(), float(f1.max())),
            "pixel_pro": (overlap - doubt, overlap + doubt),
        }
        return {name: (max(0.0, low), min(1.0, high)) for name, (low, high) in bounds.items()}
