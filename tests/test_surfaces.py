"""Tests of the demo product families: drawing, and variation within a family."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.demo.canvas import Canvas, Light, rgb
from anomaly_clip.demo.defects import DEFECTS
from anomaly_clip.demo.photographs import CATEGORIES
from anomaly_clip.demo.surfaces import FAMILIES, bevel, fitting_defects, vary

BY_FAMILY = {category.family: category for category in CATEGORIES.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_drawn(name: str) -> None:
    family, look = FAMILIES[name], BY_FAMILY[name]
    light = Light(0.6, 0.0, 0.8, 0.5)
    canvas = Canvas(look, light, np.random.default_rng(0), 64, family.is_object)
    surface = family.draw(canvas)
    assert surface.albedo.shape == (3, 64, 64)
    assert surface.height.shape == (64, 64)
    assert np.isfinite(surface.albedo).all()
    assert np.isfinite(surface.height).all()
    assert (surface.cover is not None) == family.is_object
    if surface.cover is not None:
        assert surface.cover.max() == 1
        assert surface.cover.min() == 0


def test_defects_of_a_family_are_known() -> None:
    for category in CATEGORIES.values():
        assert set(fitting_defects(category)) <= set(DEFECTS)
        assert len(fitting_defects(category)) >= 3


def test_variants_stay_in_their_family_and_contrast_with_the_background() -> None:
    rng = np.random.default_rng(0)
    look = BY_FAMILY["gear"]
    variants = [vary(look, rng) for _ in range(50)]
    assert {variant.family for variant in variants} == {"gear"}
    assert {variant.count for variant in variants} <= set(FAMILIES["gear"].counts)
    assert len({variant.colours for variant in variants}) > 40
    apart = [np.abs(rgb(v.colours[0]) - rgb(v.ground)).mean() for v in variants]
    assert np.mean(np.array(apart) > 0.1) > 0.9


def test_a_bevel_falls_towards_the_edge() -> None:
    relief = bevel(np.array([-1.0, -0.1, -0.05, 0.0]), width=0.1, slope=1.0)
    assert relief.tolist() == pytest.approx([0.05, 0.05, 0.05 * 0.75, 0.0])
