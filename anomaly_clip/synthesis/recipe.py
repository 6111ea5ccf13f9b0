"""Interface of all recipes, which add a synthetic defect to a normal image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.records import Synthetic

__all__ = ["Image", "Mask", "Recipe"]

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Recipe(ABC):
    """Frozen dataclass of settings; an instance is called with an image and a random generator."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def __call__(
        self,
        image: Image,
        rng: np.random.Generator,
        donor: Callable[[], Image] | None = None,
        foreground: Mask | None = None,
    ) -> Synthetic:
        """Return the image with a defect.

        Args:
            image: ``(H, W, 3)``, normal.
            rng: Source of all random numbers.
            donor: Function that returns another normal image of the same category and size; only
                NSA needs it.
            foreground: ``(H, W)``, True where defects may lie. Default: anywhere.

        Returns:
            The defective image with mask, label and info. If the defect is invisible, the image is
            unchanged and the mask is empty. If the recipe knows the reason, info holds the reason
            under ``failed``.

        Raises:
            ValueError: If the image is not uint8 ``(H, W, 3)``, or a required donor is missing or
                returns an image of a different size.
        """
