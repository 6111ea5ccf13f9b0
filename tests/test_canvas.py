"""Tests of the noise, colours and planes of the demo images."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_clip.demo.canvas import (
    Canvas,
    Category,
    Light,
    Surface,
    cut_noise,
    mix,
    noise_tile,
    ramp,
    rgb,
)

LIGHT = Light(0.6, 0.0, 0.8, 0.5)


def test_colours_and_ramps_by_hand() -> None:
    assert rgb(0xFF0033).ravel().tolist() == pytest.approx([1.0, 0.0, 0.2])
    x = np.array([0.0, 1.0, 2.0, 3.0, 9.0], np.float32)
    assert ramp(x, 1, 3).tolist() == [0, 0, 0.5, 1, 1]
    assert mix(np.float32(2), np.float32(4), np.array([0, 0.5, 1])).tolist() == [2, 3, 4]


@pytest.mark.parametrize("kind", ["cloud", "fractal", "grain"])
def test_noise_has_deviation_one(kind: str) -> None:
    tile = noise_tile(kind, 128)
    assert tile.shape == (384, 384)
    assert tile.std() == pytest.approx(1, rel=1e-4)
    assert abs(tile.mean()) < 0.3


def test_noise_depends_on_its_generator_alone_and_zoom_enlarges_it() -> None:
    first, again, zoomed = (
        cut_noise(("fractal",), np.random.default_rng(0), 128, (64, 80), zoom)[0]
        for zoom in (1, 1, 4)
    )
    assert first.shape == (64, 80)
    assert np.array_equal(first, again)
    rough, smooth = (np.abs(np.diff(plane)).mean() for plane in (first, zoomed))
    assert smooth < rough / 1.5


def test_a_cut_shares_memory_and_leaves_single_colours() -> None:
    plane = np.zeros((8, 8), np.float32)
    whole = Surface(np.zeros((3, 8, 8)), plane, None, rgb(1), rgb(2), 0.5, plane)
    part = whole.cut(slice(2, 5), slice(0, 4))
    assert part.albedo.shape == (3, 3, 4)
    assert part.height.shape == (3, 4)
    assert part.under.shape == (3, 1, 1)
    assert part.metal == 0.5
    assert np.shares_memory(part.height, plane)


def test_an_edge_is_half_covered_where_the_distance_is_zero() -> None:
    canvas = Canvas(
        Category("pill", "pill", (0x808080,)), LIGHT, np.random.default_rng(0), 64, True
    )
    assert canvas.u.shape == canvas.v.shape == (64, 64)
    distance = np.array([-1.0, -0.5 / 64, 0, 0.25 / 64, 1])
    assert canvas.edge(distance).tolist() == [1, 1, 0.5, 0.25, 0]
