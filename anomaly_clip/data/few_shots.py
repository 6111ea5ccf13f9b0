"""Random samples of normal training images: few shots to train on, and reference images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anomaly_clip.data.samplers import draw_few
from anomaly_clip.data.samples import Sample
from anomaly_clip.errors import check_at_least, check_between

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["FewShots"]


class FewShots:
    """Limit on the number of normal training images per category, which are sampled at random.

    The seed of each category's sample is (seed, category).

    Args:
        data: The data module.
        shots: Number of images per category; None for all.
        fraction: Alternative to shots: fraction of the images, at least one; None for all.
    """

    def __init__(self, data: AnomalyData, shots: int | None, fraction: float | None) -> None:
        if shots is not None:
            check_at_least("data.shots", shots, 1)
        if fraction is not None:
            check_between("data.fraction", fraction, 0, 1, open_low=True)
            if shots is not None:
                raise ValueError(
                    f"data.shots {shots} and data.fraction {fraction} exclude each other: leave "
                    f"one of them out"
                )
        self.data = data
        self.shots = shots
        self.fraction = fraction

    @property
    def is_limited(self) -> bool:
        """True if only some of the images are used."""
        return self.shots is not None or self.fraction is not None

    def check(self) -> None:
        """Check that there are images to sample from.

        Raises:
            ValueError: If there is a limit but no training split.
        """
        for name, limit in (("shots", self.shots), ("fraction", self.fraction)):
            if limit is not None and "train" not in self.data.splits:
                raise ValueError(
                    f"data.{name} {limit}: {self.data.dataset_name} has no train images to sample "
                    f"from: leave data.{name} out"
                )

    def of(self, category: str) -> list[Sample]:
        """Return the few-shot images of a category; smaller samples are subsets of larger ones.

        Raises:
            ValueError: If there is no limit, or there are fewer images than ``shots``.
        """
        data = self.data
        if not self.is_limited:
            raise ValueError(
                f"data.shots is {self.shots}: set the number of normal images per category"
            )
        if "train" not in data.splits:
            raise ValueError(
                f"{data.dataset_name} has no train images to sample shots from: choose a data set "
                f"that has some"
            )
        normal = data.listing.normal(category)
        if data.validation.is_synthetic:  # the held-out images do not depend on the number of shots
            held_out = data.validation.held_normal
            normal = [sample for sample in normal if sample not in held_out]
        count = self.shots
        if count is None:
            readable = len(data.unreadable.readable(normal))
            count = max(1, round((self.fraction or 1.0) * readable))
        drawn = self._drawn_of(normal, count, data.seed, category)
        if len(drawn) < count:
            raise ValueError(
                f"data.shots {self.shots}: category {category!r} has "
                f"{self._number_of(normal)}: lower data.shots, or add images"
            )
        return drawn

    def _drawn_of(self, normal: list[Sample], count: int, seed: int, category: str) -> list[Sample]:
        """Sample ``count`` images that can be read, or all if there are fewer."""

        def usable(row: int) -> bool:
            return self.data.unreadable.is_readable(normal[row])

        return [normal[row] for row in draw_few(len(normal), count, seed, category, usable)]

    def _number_of(self, normal: list[Sample]) -> str:
        readable = len(self.data.unreadable.readable(normal))
        rest = "" if readable == len(normal) else " that can be read"
        return f"{readable} normal training images{rest}"

    def drawn(self, category: str, count: int, seed: int) -> list[Sample]:
        """Sample ``count`` normal training images of any category with the seed (seed, category).

        Raises:
            ValueError: If there are no training images, or fewer than ``count``.
        """
        data = self.data
        if "train" not in data.splits:
            raise ValueError(
                f"{data.dataset_name} has no train images to use as references: choose a data set "
                f"that has some"
            )
        normal = data.listing.normal(category)
        drawn = self._drawn_of(normal, count, seed, category)
        if len(drawn) < count:
            raise ValueError(
                f"model.shots {count}: category {category!r} has {self._number_of(normal)} in "
                f"{data.root}: lower model.shots, or add images"
            )
        return drawn
