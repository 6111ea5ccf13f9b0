"""The interface of all recipes: a normal image goes in, one with a defect comes out."""

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
    """A frozen dataclass of settings that is called with an image and a random generator."""

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
            rng: Draws all.
            donor: Returns another normal image of the same kind and size; not all recipes need one.
            foreground: ``(H, W)``, where defects may lie. Default: anywhere.

        Returns:
            If nothing visible came of it: the image as it was, an empty mask, and ``failed`` in
            info, as far as the recipe knows the reason.

        Raises:
            ValueError: If the image is no uint8 image, or a donor is needed and missing or of
                another size.
        """
