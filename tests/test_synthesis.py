from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthesis_images import noise_image

from anomaly_clip.synthesis.cutpaste import CutPaste
from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.perlin import Perlin

RECIPES: list[Any] = [
    Perlin(source="self"),
    Perlin(source="noise"),
    Perlin(source="code"),
    CutPaste("patch"),
    CutPaste("scar"),
    CutPaste(tighten=False),
    Erasing(),
    Erasing("cells", fill="black"),
    Erasing(tighten=False),
]


@pytest.mark.parametrize("make", RECIPES, ids=str)
def test_outside_its_mask_nothing_changes(make: Any) -> None:
    image = noise_image(np.random.default_rng(0), 96, 80, 2)
    kept, num_defects, last = image.copy(), 0, None
    for seed in range(10):
        result = make(image, np.random.default_rng(seed))
        again = make(image, np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(result[:3], again[:3], strict=True))
        assert (result.image.dtype, result.image.shape) == (np.uint8, image.shape)
        assert np.array_equal(result.label, result.mask.astype(np.float32))
        change = np.abs(result.image.astype(int) - image).max(axis=2)
        # Tightened masks leave out invisible changes.
        assert change[~result.mask].max() <= (10 if result.mask.any() else 0)
        assert result.mask.any() or getattr(make, "source", "") or result.info["failed"]
        num_defects += int(result.mask.any())
        if result.mask.any():
            assert last is None or not np.array_equal(result.image, last)
            last = result.image
    assert num_defects >= 5
    assert np.array_equal(image, kept)


@given(
    height=st.integers(16, 2048),
    width=st.integers(16, 400),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, len(RECIPES) - 1),
)
@settings(max_examples=25)
def test_recipes_take_any_size(height: int, width: int, seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for oriented in (image, image.swapaxes(0, 1).copy()):
        result = RECIPES[number](oriented, rng)
        assert result.image.shape == oriented.shape
        assert result.mask.shape == oriented.shape[:2]


def test_defects_lie_in_the_foreground() -> None:
    image = noise_image(np.random.default_rng(0), 96, 96, 2)
    inside = np.zeros((96, 96), bool)
    inside[20:60, 30:80] = True
    for seed in range(10):
        perlin = Perlin(source="noise", threshold=0.2)(
            image, np.random.default_rng(seed), None, inside
        )
        assert not perlin.mask[~inside].any()
        for make in (CutPaste("patch", tighten=False), Erasing(count=(1, 1), tighten=False)):
            result = make(image, np.random.default_rng(seed), None, inside)
            if result.mask.any():
                rows, columns = np.nonzero(result.mask)
                assert inside[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]


def test_mistakes() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Perlin, {"threshold": 2}, "threshold must be in"),
        (Perlin, {"source": "folder"}, "needs texture images"),
        (Perlin, {"least_opacity": 0}, "least_opacity must be in"),
        (CutPaste, {"area": (0.5, 0.1)}, "expected 0 < smallest <= largest"),
        (CutPaste, {"area": (0.5, 2)}, "expected at most 1"),
        (CutPaste, {"jitter": 0.7}, "jitter must be in"),
        (Erasing, {"grid": 0}, "must be 1 or more"),
        (Erasing, {"count": (0, 2)}, "expected 0 < smallest"),
    ]
    for kind, options, message in cases:
        with pytest.raises(ValueError, match=message):
            kind(**options)
    for make in RECIPES:
        for image in (np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))):
            with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\) of at least 1 x 1 pix"):
                make(image, np.random.default_rng(0))
