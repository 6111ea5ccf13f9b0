from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.sparse as sparse
from helpers import save_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.linalg import spsolve
from skimage.filters import median as plain_median
from skimage.morphology import disk as plain_disk

from anomaly_clip.synthesis import textures
from anomaly_clip.synthesis.cutpaste import CutPaste, jittered
from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.masks import foreground_of, tightened
from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.nsa_labels import disk, label_of, median_over_disk
from anomaly_clip.synthesis.perlin import Perlin, perlin_noise
from anomaly_clip.synthesis.poisson import blend, blend_opencv, bounding_box, solve
from anomaly_clip.synthesis.presets import NSA_CLASSES, PRESETS, preset


def picture(rng: np.random.Generator, height: int, width: int, sigma: float) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def shapes(rng: np.random.Generator, height: int, width: int, kind: int) -> NDArray[np.bool_]:
    """Return a full, an elliptic or a ragged mask."""
    if kind == 0:
        return np.ones((height, width), bool)
    if kind == 1:
        mask = np.zeros((height, width), np.uint8)
        axes = (max(1, width * 2 // 5), max(1, height // 3))
        cv2.ellipse(mask, (width // 2, height // 2), axes, 20, 0, 360, 1, -1)
        return mask.astype(bool)
    smooth = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 3)
    return np.asarray(smooth > 0)


def test_blending_is_within_a_grey_level_of_opencv() -> None:
    """200 cases: both kinds of gradients, full, elliptic and ragged masks; full ones reach the
    border."""
    means = []
    for number in range(100):
        rng = np.random.default_rng(number)
        height, width = (int(side) for side in rng.integers(8, 120, 2))
        background = picture(rng, height, width, float(rng.choice([0, 1, 3])))
        patch = picture(rng, height, width, float(rng.choice([0, 1, 3])))
        mask = shapes(rng, height, width, number % 3)
        given_mask = mask.copy()
        for gradients in ("normal", "mixed"):
            ours = blend(background, patch, mask, gradients)
            theirs = blend_opencv(background, patch, mask, gradients)
            apart = np.abs(ours.astype(int) - theirs)
            assert apart.max() <= 1, (number, gradients)
            means.append(apart.mean())
            box = bounding_box(mask)
            outside = np.ones_like(mask)
            if box is not None:
                outside[box] = False
            assert np.array_equal(ours[outside], background[outside])
        assert np.array_equal(mask, given_mask)
    assert np.mean(means) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (12, 9), (20, 20)])
@pytest.mark.parametrize("largest", [0, 256])
def test_the_solver_equals_a_sparse_one(
    height: int, width: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both transforms: products with sines, and the fast one."""
    monkeypatch.setattr("anomaly_clip.synthesis.poisson.LARGEST_PRODUCT", largest)

    def second(size: int) -> sparse.spmatrix:
        ones = np.ones(size)
        return sparse.diags([ones[1:], -2 * ones, ones[1:]], [-1, 0, 1])

    laplace = sparse.kron(second(height), sparse.eye(width)) + sparse.kron(
        sparse.eye(height), second(width)
    )
    wanted = np.random.default_rng(0).normal(size=(3, height, width)) * 50
    found = solve(wanted)
    for own, given_values in zip(found, wanted, strict=True):
        plain = spsolve(laplace.tocsc(), given_values.ravel()).reshape(height, width)
        np.testing.assert_allclose(own, plain, rtol=0, atol=1e-8)


def test_blending_what_is_there_already_changes_nothing() -> None:
    image = picture(np.random.default_rng(0), 50, 60, 1)
    mask = shapes(np.random.default_rng(0), 50, 60, 2)
    for gradients in ("normal", "mixed"):
        assert np.array_equal(blend(image, image, mask, gradients), image)
        brighter = np.minimum(image, 200) + np.uint8(40)  # the same gradients but where clipped
        assert np.array_equal(blend(np.minimum(image, 200), brighter, mask), np.minimum(image, 200))
    with pytest.raises(ValueError, match="must have the same size"):
        blend(image, image[1:], mask)
    assert np.array_equal(blend(image, image[::-1].copy(), np.zeros_like(mask)), image)


def plain_label(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_], kind: str
) -> NDArray[np.float64]:
    """Return the label as the specification says, over the whole image."""
    inside = mask[..., None].astype(float)
    change = np.abs(inside * before - inside * after)
    changed = cv2.medianBlur((change.mean(axis=2) > 1).astype(np.uint8), 5)
    if kind == "binary":
        return changed.astype(float)
    level = changed[..., None].astype(float)
    intensity = plain_median(np.abs(level * before - level * after).mean(axis=2), plain_disk(5))
    if kind == "intensity":
        return intensity
    return changed / (1 + np.exp(-1 / 6 * (intensity - 20)))


@pytest.mark.parametrize("kind", ["binary", "intensity", "logistic-intensity"])
def test_labels_are_those_of_the_plain_way_to_the_bit(kind: Any) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        before = picture(rng, 90, 110, 1)
        after, mask = before.copy(), np.zeros((90, 110), bool)
        for _ in range(3):
            height, width = rng.integers(5, 50, 2)
            top, left = rng.integers(0, 90 - height), rng.integers(0, 110 - width)
            box = np.s_[0 if seed % 2 else top : top + height, left : left + width]
            change = rng.normal(0, rng.choice([2, 30]), after[box].shape[:2])[..., None]
            after[box] = np.clip(after[box] + change, 0, 255)
            mask[box] = True
        ours = label_of(before, after, mask, kind)
        assert np.array_equal(ours, plain_label(before, after, mask, kind).astype(np.float32))


def test_the_median_over_a_disk() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 700, (40, 33)).astype(np.uint16)
    values[rng.random(values.shape) < 0.4] = 0
    assert disk(5).sum() == 81
    plain = plain_median(values, plain_disk(5))
    assert np.array_equal(median_over_disk(values), plain)
    where = rng.random(values.shape) < 0.3
    assert np.array_equal(median_over_disk(values, where), np.where(where, plain, 0))


def plain_perlin(size: int, cells: tuple[int, int], angles: NDArray[np.float64]) -> NDArray[Any]:
    """Return the noise by its definition, pixel by pixel."""
    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * cells[0] / size, column * cells[1] / size
            i, j = int(y), int(x)
            total = 0.0
            for a in (0, 1):
                for b in (0, 1):
                    dy, dx = y - i - a, x - j - b
                    weight = 1.0
                    for t in (abs(dy), abs(dx)):
                        weight *= 1 - (6 * t**5 - 15 * t**4 + 10 * t**3)
                    angle = angles[i + a, j + b]
                    total += weight * (np.cos(angle) * dy + np.sin(angle) * dx)
            result[row, column] = np.sqrt(2) * total
    return result


@pytest.mark.parametrize("cells", [(1, 1), (2, 8), (32, 4)])
def test_noise_is_that_of_its_definition(cells: tuple[int, int]) -> None:
    angles = np.random.default_rng(3).uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    ours = perlin_noise((32, 32), cells, np.random.default_rng(3))
    np.testing.assert_allclose(ours, plain_perlin(32, cells, angles), atol=1e-6)
    assert perlin_noise((250, 392), cells, np.random.default_rng(0)).shape == (250, 392)


@pytest.mark.parametrize(
    ("size", "empty", "area", "quantiles"),
    [(256, 0.055, 0.052, (0.027, 0.047, 0.074)), (224, 0.04, 0.049, (0.029, 0.046, 0.07))],
)
def test_perlin_masks_have_the_measured_statistics(
    size: int, empty: float, area: float, quantiles: tuple[float, ...]
) -> None:
    """Of the specification of CLIP-ADA, section 5.1: within a quarter, of 600 draws."""
    image, make = np.full((size, size, 3), 99, np.uint8), Perlin(source="self", num_changes=0)
    shares = np.array(
        [make(image, np.random.default_rng([1, number])).mask.mean() for number in range(600)]
    )
    some = shares[shares > 0]
    spread = np.sqrt(2 * empty * (1 - empty) / 600)  # both are counts of 600
    assert 1 - len(some) / 600 == pytest.approx(empty, abs=max(0.25 * empty, 4 * spread))
    assert some.mean() == pytest.approx(area, rel=0.25)
    for own, wanted in zip(np.quantile(some, (0.1, 0.5, 0.9)), quantiles, strict=True):
        assert own == pytest.approx(wanted, rel=0.25)


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
    image = picture(np.random.default_rng(0), 96, 80, 2)
    kept, found, made_before = image.copy(), 0, None
    for seed in range(10):
        made = make(image, np.random.default_rng(seed))
        again = make(image, np.random.default_rng(seed))
        assert all(np.array_equal(a, b) for a, b in zip(made[:3], again[:3], strict=True))
        assert (made.image.dtype, made.image.shape) == (np.uint8, image.shape)
        assert np.array_equal(made.label, made.mask.astype(np.float32))
        apart = np.abs(made.image.astype(int) - image).max(axis=2)
        # What is replaced by its like is left out of tightened masks.
        assert apart[~made.mask].max() <= (10 if made.mask.any() else 0)
        assert made.mask.any() or getattr(make, "source", "") or made.info["failed"]
        found += int(made.mask.any())
        if made.mask.any():
            assert made_before is None or not np.array_equal(made.image, made_before)
            made_before = made.image
    assert found >= 5
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
    for one in (image, image.swapaxes(0, 1).copy()):
        made = RECIPES[number](one, rng)
        assert made.image.shape == one.shape
        assert made.mask.shape == one.shape[:2]


def test_a_foreground_is_kept_to() -> None:
    image = picture(np.random.default_rng(0), 96, 96, 2)
    inside = np.zeros((96, 96), bool)
    inside[20:60, 30:80] = True
    for seed in range(10):
        perlin = Perlin(source="noise", threshold=0.2)(
            image, np.random.default_rng(seed), None, inside
        )
        assert not perlin.mask[~inside].any()
        for make in (CutPaste("patch", tighten=False), Erasing(count=(1, 1), tighten=False)):
            made = make(image, np.random.default_rng(seed), None, inside)
            if made.mask.any():
                rows, columns = np.nonzero(made.mask)
                assert inside[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]


def test_a_cut_patch_is_a_piece_of_the_image() -> None:
    image = picture(np.random.default_rng(0), 64, 64, 0)
    for seed in range(10):
        made = CutPaste("patch", jitter=0.0, tighten=False)(image, np.random.default_rng(seed))
        rows, columns = np.nonzero(made.mask)
        piece = made.image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        share = made.mask.mean()
        assert 0.015 < share < 0.16
        height, width = piece.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(image, (height, width, 3))
        assert (windows == piece).all(axis=(-3, -2, -1)).any()


def test_jitter_keeps_within_its_bounds() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = {int(jittered(grey, 0.1, np.random.default_rng(s))[0, 0, 0]) for s in range(30)}
    assert min(levels) >= 89
    assert max(levels) <= 111
    assert len(levels) > 5
    assert np.array_equal(jittered(grey, 0.0, np.random.default_rng(0)), grey)


def test_cells_of_one_group() -> None:
    """TAB's: 14 x 14 cells of 16 pixels, 4 of them black."""
    white = np.full((224, 224, 3), 255, np.uint8)
    make = preset("erasing", "tab_mask")
    for seed in range(5):
        made = make(white, np.random.default_rng(seed))
        cells = made.mask.reshape(14, 16, 14, 16).mean(axis=(1, 3))
        assert set(np.unique(cells)) <= {0.0, 1.0}
        assert 3 <= cells.sum() <= 4  # the padded list may hold a cell twice
        assert (made.image[made.mask] == 0).all()


def test_what_was_replaced_by_its_like_is_no_defect() -> None:
    before = np.full((40, 40, 3), 100, np.uint8)
    after, mask = before.copy(), np.zeros((40, 40), bool)
    mask[5:30, 5:30] = True
    after[5:30, 5:30] = 105
    assert not tightened(before, after, mask).any()
    after[10:20, 10:20] = 200
    seen = tightened(before, after, mask)
    assert seen.sum() == 100
    assert seen[10:20, 10:20].all()
    after[:] = before
    after[6, 6:16] = 255  # ten pixels are too few
    assert not tightened(before, after, mask).any()


def test_textures_come_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "textures" / "woven"
    save_picture(folder / "a.png", np.full((30, 40, 3), 7, np.uint8))
    image = np.full((64, 64, 3), 99, np.uint8)
    make = Perlin(0.2, "folder", str(tmp_path / "textures"), num_changes=0, least_opacity=1.0)
    seen = 0
    for seed in range(5):
        made = make(image, np.random.default_rng(seed))
        assert (made.image[made.mask] == 7).all()
        seen += int(made.mask.any())
    assert seen
    textures._textures.cache_clear()
    nowhere = Perlin(0.2, "folder", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="no pictures of textures there"):
        nowhere(image, np.random.default_rng(0))


@pytest.mark.parametrize("change", textures.CHANGES, ids=lambda change: change.__name__)
def test_changes_of_colour(change: Any) -> None:
    image = picture(np.random.default_rng(0), 40, 50, 1)
    kept = image.copy()
    seen = [change(image, np.random.default_rng(seed)) for seed in range(6)]
    assert all((one.dtype, one.shape) == (np.uint8, image.shape) for one in seen)
    assert any(not np.array_equal(one, image) for one in seen)
    assert np.array_equal(image, kept)
    assert change(np.full((20, 20, 3), 77, np.uint8), np.random.default_rng(0)).shape == (20, 20, 3)


def test_the_foreground_of_an_object() -> None:
    rows, columns = np.mgrid[:100, :120]
    disc = (rows - 50) ** 2 + (columns - 60) ** 2 < 30**2
    noise = np.random.default_rng(0).normal(0, 4, (100, 120, 1))
    image = np.where(disc[..., None], [180, 60, 60], [90, 95, 90]) + noise
    found = foreground_of(image.clip(0, 255).astype(np.uint8))
    shared = (found & disc).sum() / (found | disc).sum()
    assert shared > 0.9
    assert foreground_of(np.full((50, 50, 3), 80, np.uint8)).all()


def test_presets() -> None:
    for recipe, known in PRESETS.items():
        for name in known:
            made = preset(recipe, name)
            image = picture(np.random.default_rng(0), 64, 64, 1)
            other = image[::-1].copy()
            assert made(image, np.random.default_rng(0), other.copy).image.any()
    assert len(NSA_CLASSES) == 15
    capsule = preset("nsa", "nsa_mvtec", "capsule")
    assert isinstance(capsule, NSA)
    assert capsule.bounds == ((0.03, 0.15), (0.03, 0.40))
    assert preset("nsa", "nsa_mvtec", "candle") == preset("nsa", "tab")
    assert preset("perlin", "draem", options={"threshold": 0.3}) == Perlin(threshold=0.3)
    for arguments, sentence in (
        (("paint",), "recipe paint: unknown"),
        (("nsa", "draem"), "preset draem: unknown for nsa"),
        (("nsa", "tab", "", {"colour": 1}), "options: nsa has no colour"),
    ):
        with pytest.raises(ValueError, match=sentence):
            preset(*arguments)


def test_mistakes() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Perlin, {"threshold": 2}, "threshold must be in"),
        (Perlin, {"source": "folder"}, "name it with folder"),
        (Perlin, {"least_opacity": 0}, "least_opacity must be in"),
        (CutPaste, {"area": (0.5, 0.1)}, "expected 0 < smallest <= largest"),
        (CutPaste, {"area": (0.5, 2)}, "at most 1"),
        (CutPaste, {"jitter": 0.7}, "jitter must be in"),
        (Erasing, {"grid": 0}, "must be 1 or more"),
        (Erasing, {"count": (0, 2)}, "expected 0 < smallest"),
    ]
    for kind, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            kind(**options)
    for make in RECIPES:
        for image in (np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))):
            with pytest.raises(ValueError, match=r"expected an image uint8 \(H, W, 3\), got"):
                make(image, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("perlin", {"source": "dtd"}, "source 'dtd': expected one of folder, self, noise, code"),
        ("perlin", {"num_changes": 2.5}, "num_changes 2.5: expected a whole number"),
        ("perlin", {"folder": 5}, "folder 5: expected a text or null"),
        ("cutpaste", {"kind": "scars"}, "kind 'scars': expected one of patch, scar, union"),
        ("cutpaste", {"jitter": "a"}, "jitter 'a': expected a number"),
        ("erasing", {"fill": "white"}, "fill 'white': expected one of black, mean"),
        ("erasing", {"grid": 14.5}, "grid 14.5: expected a whole number"),
        ("nsa", {"mode": "poisson"}, "mode 'poisson': expected one of normal, mixed"),
        ("nsa", {"bounds": [0.1, 0.2]}, r"bounds .*expected \[\[a number, a number\]"),
        ("nsa", {"resize": 0.5}, r"resize 0.5: expected \[a number, a number\] or null"),
        ("nsa", {"resize": [2, 0.5]}, "resize .*expected 0 < smallest"),
        ("nsa", {"ellipses": -1}, "ellipses must be 0 or more"),
        ("nsa", {"least_object": -1}, "least_object must be in"),
        ("nsa", {"background": [[1, 2, 3]]}, r"background .*a list of \[a number, a number\]"),
    ],
)
def test_options_are_typed(recipe: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        preset(recipe, options=options)


def test_a_single_pair_is_a_background() -> None:
    made = preset("nsa", options={"background": [200, 60]})
    assert isinstance(made, NSA)
    assert made.background == ((200, 60),)


def test_a_patch_is_not_pasted_onto_itself() -> None:
    """Where it comes from is read off its pixels, all of which differ."""
    rows, columns = np.indices((64, 64), dtype=np.uint8)
    image = np.dstack([rows, columns, np.full_like(rows, 200)])
    for seed in range(100):
        made = CutPaste("patch", jitter=0.0, tighten=False)(image, np.random.default_rng(seed))
        there = np.argwhere(made.mask)
        origin = {tuple(pixel) for pixel in made.image[made.mask][:, :2].tolist()}
        place = {tuple(pixel) for pixel in there.tolist()}
        assert len(origin) == len(place)
        assert len(origin & place) / len(origin | place) <= 0.5, seed
