from __future__ import annotations

import inspect

import numpy as np
import pytest

from anomaly_clip.synthesis.presets import RECIPES
from anomaly_clip.synthesis.recipe import Recipe


@pytest.mark.parametrize("kind", RECIPES.values())
def test_all_recipes_have_the_same_signature(kind: type[Recipe]) -> None:
    assert issubclass(kind, Recipe)
    expected = inspect.signature(Recipe.__call__).parameters
    assert list(inspect.signature(kind.__call__).parameters) == list(expected)
    result = kind()(
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.random.default_rng(1),
        lambda: np.zeros((64, 64, 3), np.uint8),
    )
    assert result.image.dtype == np.uint8
    assert result.image.shape == (64, 64, 3)
    assert result.mask.shape == result.label.shape == (64, 64)


def test_the_interface_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Recipe()  # type: ignore[abstract]
