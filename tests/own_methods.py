"""Methods with mistakes, as somebody outside the package may write them."""

from __future__ import annotations

from typing import Any

import torch
from toy import Toy

from anomaly_clip.methods import AnomalyMethod
from anomaly_clip.records import Scores


class Undeclared(AnomalyMethod):
    """A method that does not tell whether it is fitted."""

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return 32

    def score(self, images: torch.Tensor, categories: list[str]) -> Scores:
        """Score by brightness."""
        maps = images.float().mean(dim=1)
        return Scores(image_score=maps.amax(dim=(1, 2)), anomaly_map=maps)


class Bodiless(Undeclared):
    """A method without a backbone."""

    must_be_fitted = False
    can_be_fitted = False


class Incomplete(AnomalyMethod):
    """A method that does not implement ``score``."""

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return 32


class Faulty(Toy):
    """A method with a fault in its constructor."""

    def __init__(self, number: int = 1) -> None:
        if number < 0:
            raise ValueError("number is negative")
        _: Any = number + "a"  # type: ignore[operator]
