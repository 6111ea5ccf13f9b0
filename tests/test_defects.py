"""Tests of synthetic defects: they change a copy of a patch and leave the scene as it is."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.demo.canvas import Canvas, Light, Surface
from anomaly_clip.demo.defects import DEFECTS, DefectPatch, spoil
from anomaly_clip.demo.photographs import CATEGORIES
from anomaly_clip.demo.surfaces import FAMILIES

LIGHT = Light(0.6, 0.0, 0.8, 0.5)


def scene(name: str) -> Surface:
    look = next(category for category in CATEGORIES.values() if category.family == name)
    family = FAMILIES[name]
    return family.draw(Canvas(look, LIGHT, np.random.default_rng(0), 128, family.is_object))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_a_copy_of_a_part(defect: str) -> None:
    whole = scene("wood")
    albedo, height = whole.albedo.copy(), whole.height.copy()
    rows, columns, spoilt = spoil(whole, defect, LIGHT, np.random.default_rng(1))
    assert np.array_equal(whole.albedo, albedo)
    assert np.array_equal(whole.height, height)
    before = whole.cut(rows, columns)
    assert spoilt.albedo.shape == before.albedo.shape
    changed = (
        np.abs(spoilt.albedo - before.albedo).max() + np.abs(spoilt.height - before.height).max()
    )
    assert changed > 0


def test_a_defect_depends_on_its_generator_alone() -> None:
    whole = scene("wood")
    first, again = (spoil(whole, "stain", LIGHT, np.random.default_rng(2)) for _ in range(2))
    assert first[:2] == again[:2]
    assert np.array_equal(first[2].albedo, again[2].albedo)


def test_a_patch_has_even_bounds_inside_the_image() -> None:
    whole = scene("wood")
    patch = DefectPatch(whole, LIGHT, np.random.default_rng(0), (0.1, 0.9), (-0.3, -0.1, 0.2, 0.3))
    assert (patch.columns.start, patch.rows.stop) == (0, 128)
    for cut in (patch.rows, patch.columns):
        assert cut.start % 2 == cut.stop % 2 == 0
    # Coordinates are relative to the defect's place, in image widths.
    assert patch.x[0, 0] == pytest.approx(0.5 / 128 - 0.1)
    assert patch.y[-1, 0] == pytest.approx(1 - 0.5 / 128 - 0.9)
