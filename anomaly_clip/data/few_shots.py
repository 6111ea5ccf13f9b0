"""Draws of normal training images: few shots to learn from, and references to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anomaly_clip.data.samplers import draw_few
from anomaly_clip.data.samples import Sample
from anomaly_clip.errors import check_at_least, check_between

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["FewShots"]


class FewShots:
    """A limit on the normal training images of each category, drawn by (seed, category).

    Args:
        data: The data module.
        shots: Their number; None for all.
        fraction: Instead of shots: their share, one image at least; None for all.
    """

    def __init__(self, data: AnomalyData, shots: int | None, fraction: float | None) -> None:
        if shots is not None:
            check_at_least("data.shots", shots, 1)
        if fraction is not None:
            check_between("data.fraction", fraction, 0, 1, open_low=True)
            if shots is not None:
                raise ValueError(
                    f"data.shots {shots} and data.fraction {fraction} say the same: give one of "
                    f"them"
                )
        self.data = data
        self.shots = shots
        self.fraction = fraction

    @property
    def is_limited(self) -> bool:
        """Whether only some of the images are used."""
        return self.shots is not None or self.fraction is not None

    def check(self) -> None:
        """Check that there are images to draw from.

        Raises:
            ValueError: If there is a limit, and no training split.
        """
        for name, limit in (("shots", self.shots), ("fraction", self.fraction)):
            if limit is not None and "train" not in self.data.splits:
                raise ValueError(
                    f"data.{name} {limit}: {self.data.dataset_name} has no train images to draw "
                    f"from"
                )

    def of(self, category: str) -> list[Sample]:
        """Return the images of a category that are used; fewer are always among more.

        Raises:
            ValueError: If there is no limit, or there are fewer images than ``shots``.
        """
        data = self.data
        if not self.is_limited:
            raise ValueError("data.shots is not given: it says how many normal images there are")
        if "train" not in data.splits:
            raise ValueError(f"{data.dataset_name} has no train images, so there are no shots")
        normal = data.listing.normal(category)
        if data.validation.is_synthetic:  # the same images validate, however few are trained
            held_out = set(data.validation.normal_parts[1])
            normal = [sample for sample in normal if sample not in held_out]
        count = self.shots
        if count is None:
            count = max(1, round((self.fraction or 1.0) * len(normal)))
        if len(normal) < count:
            raise ValueError(
                f"data.shots {self.shots}: category {category!r} has {len(normal)} normal "
                f"training images"
            )
        return [normal[row] for row in draw_few(len(normal), count, data.seed, category)]

    def drawn(self, category: str, count: int, seed: int) -> list[Sample]:
        """Return ``count`` normal training images of any category, drawn by (seed, category).

        Raises:
            ValueError: If there are no training images, or fewer.
        """
        data = self.data
        if "train" not in data.splits:
            raise ValueError(
                f"{data.dataset_name} has no train images, so there are none to compare with: "
                f"take a data set that has some"
            )
        normal = data.listing.normal(category)
        if len(normal) < count:
            raise ValueError(
                f"model.shots {count}: category {category!r} has {len(normal)} normal training "
                f"images in {data.root}: ask for fewer, or add some"
            )
        return [normal[row] for row in draw_few(len(normal), count, seed, category)]
