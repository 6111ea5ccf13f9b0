from __future__ import annotations

import inspect

import numpy as np
import pytest

from anomaly_clip.synthesis.presets import RECIPES
from anomaly_clip.synthesis.recipe import Recipe


@pytest.mark.parametrize("kind", RECIPES.values())
def test_all_recipes_are_called_in_the_same_way(kind: type[Recipe]) -> None:
    assert issubclass(kind, Recipe)
    expected = inspect.signature(Recipe.__call__).parameters
    assert list(inspect.signature(kind.__call__).parameters) == list(expected)
    made = kind()(
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.random.default_rng(1),
        lambda: np.zeros((64, 64, 3), np.uint8),
    )
    assert made.image.dtype == np.uint8
    assert made.image.shape == (64, 64, 3)
    assert made.mask.shape == made.label.shape == (64, 64)


def test_an_interface_is_not_called() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Recipe()  # type: ignore[abstract]
