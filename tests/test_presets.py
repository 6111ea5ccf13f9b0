from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.perlin import Perlin
from anomaly_clip.synthesis.presets import NSA_CLASSES, PRESETS, preset


def test_presets() -> None:
    for recipe, presets in PRESETS.items():
        for name in presets:
            make = preset(recipe, name)
            image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            other = image[::-1].copy()
            assert make(image, np.random.default_rng(0), other.copy).image.any()
    assert len(NSA_CLASSES) == 15
    capsule = preset("nsa", "nsa_mvtec", "capsule")
    assert isinstance(capsule, NSA)
    assert capsule.bounds == ((0.03, 0.15), (0.03, 0.40))
    assert preset("nsa", "nsa_mvtec", "candle") == preset("nsa", "tab")
    assert preset("perlin", "draem", options={"threshold": 0.3}) == Perlin(threshold=0.3)
    for arguments, message in (
        (("paint",), "recipe paint: unknown"),
        (("nsa", "draem"), "preset draem: unknown for nsa"),
        (("nsa", "tab", "", {"colour": 1}), "options: nsa has no colour"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(*arguments)


def test_a_single_background_may_be_given_as_a_flat_pair() -> None:
    recipe = preset("nsa", options={"background": [200, 60]})
    assert isinstance(recipe, NSA)
    assert recipe.background == ((200, 60),)
