"""Synthetic defects from a configuration."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.synthesis.cutpaste import CutPaste
from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.presets import NSA_CLASSES
from anomaly_clip.synthesis.recipe import Image
from anomaly_clip.synthesis.synthesizer import SynthesisSettings, synthesize

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def no_donor() -> Image:
    raise AssertionError("not needed")


def test_a_recipe_is_built_with_its_options() -> None:
    recipe = SynthesisSettings("cutpaste", options={"jitter": 0.3}).build("cutpaste", "nut")
    assert isinstance(recipe, CutPaste)
    assert recipe.jitter == 0.3
    settings = SynthesisSettings("nsa", "nsa_mvtec")
    nsa = settings.build(settings.names()[0], "screw")
    assert isinstance(nsa, NSA)
    assert nsa.num_patches == NSA_CLASSES["screw"]["num_patches"]


def test_options_of_a_mixture_reach_their_recipe() -> None:
    settings = SynthesisSettings(
        "mixture", weights={"cutpaste": 1, "erasing": 2}, options={"erasing": {"grid": 7}}
    )
    erasing = settings.build("erasing", "nut")
    assert isinstance(erasing, Erasing)
    assert erasing.grid == 7
    recipes = [
        synthesize(settings, NOISE, "nut", np.random.default_rng(seed), no_donor).info["recipe"]
        for seed in range(60)
    ]
    assert 30 < recipes.count("erasing") < 50  # two of three are expected


def test_the_same_generator_gives_the_same_defect() -> None:
    first, again = (
        synthesize(SynthesisSettings("cutpaste"), NOISE, "nut", np.random.default_rng(3), no_donor)
        for _ in range(2)
    )
    assert np.array_equal(first.image, again.image)
    assert first.mask.any()


def test_an_invisible_defect_leaves_the_image_unchanged() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    settings = SynthesisSettings("cutpaste", options={"jitter": 0}, retries=2)
    result = synthesize(settings, flat, "nut", np.random.default_rng(0), no_donor)
    assert np.array_equal(result.image, flat)
    assert not result.mask.any()
    assert result.info["failed"] == "no visible defect in any try"


def test_an_invalid_weight_is_named() -> None:
    message = r"data\.synthesis\.weights, nsa: must be above 0, got -2"
    with pytest.raises(ValueError, match=message):
        SynthesisSettings("mixture", weights={"nsa": -2})
