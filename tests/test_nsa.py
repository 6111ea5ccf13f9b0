from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2_contingency
from skimage import data as textures

from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.presets import preset

NAMES = ("brick", "grass", "gravel")
MODES = {1: "normal", 2: "mixed", "mix": "mix"}
DISC = (85, 118, 138)  # radius, and range of the centre, as in the README of the golden data


def generator(parameters: dict[str, Any]) -> NSA:
    """Return our generator with the parameters of the authors' code."""
    tab = "width_bounds_pct" not in parameters  # TAB keeps the defaults
    options: dict[str, Any] = {
        "bounds": parameters.get("width_bounds_pct", ((0.05, 0.2), (0.05, 0.2))),
        "gamma": parameters["gamma_params"],
        "num_patches": parameters.get("num_patches", 1 if tab else 4),
        "resize": parameters.get("resize_bounds", (0.7, 1.3)),
        "mode": MODES[parameters["mode"]],
        "label": parameters["label_mode"],
    }
    if "intensity_logistic_params" in parameters:
        options["logistic"] = parameters["intensity_logistic_params"]
    if "skip_background" in parameters:
        options["background"] = [parameters["skip_background"]]
        options["least_object"] = parameters["min_object_pct"]
        options["least_overlap"] = parameters["min_overlap_pct"]
    return NSA(**options)


@cache
def texture(name: str, side: int) -> NDArray[np.uint8]:
    whole: NDArray[np.uint8] = getattr(textures, name)()
    return cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA).astype(np.uint8)


def textured_image(
    name: str, size: int, objects: bool, rng: np.random.Generator
) -> NDArray[np.uint8]:
    before = {224: 256, 256: 264}[size]
    grey = texture(name, before)
    top, left = rng.integers(0, before - size + 1, 2)
    grey = grey[top : top + size, left : left + size]
    if objects:
        radius, low, high = DISC
        centre = rng.integers(low, high, 2)
        rows, columns = np.mgrid[:size, :size]
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
        grey = np.where(inside, np.maximum(grey, 60), 10).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def drawn(case: dict[str, Any], number: int) -> tuple[list[Synthetic], list[NDArray[np.uint8]]]:
    """Return synthetic defects and the images before, as in the README of the golden data."""
    make, results, before = generator(case["parameters"]), [], []
    objects = "skip_background" in case["parameters"]
    for index in range(number):
        rng = np.random.default_rng([7, index])
        name = NAMES[rng.integers(len(NAMES))]
        image, donor = (textured_image(name, case["image_size"], objects, rng) for _ in range(2))
        results.append(make(image, rng, donor.copy))
        before.append(image)
    return results, before


@pytest.mark.slow
@pytest.mark.golden
def test_golden_distribution(golden: Callable[[str], Golden]) -> None:
    statistics = json.loads((golden("nsa").folder / "statistics.json").read_text())
    assert statistics["cases"]
    for name in statistics["cases"]:
        compare(name, statistics)


def compare(name: str, statistics: dict[str, Any]) -> None:
    """Compare a case by the tests in the README of the golden data."""
    case = statistics["cases"][name]
    number = statistics["samples_per_case"]
    results, before = drawn(case, 2 * number)  # twice the published number, for stable tails
    patches = [result.info["patches"] for result in results]
    boxes = [patch["box"] for several in patches for patch in several if "box" in patch]

    for key, counts in (
        ("patches_attempted_hist", [len(several) for several in patches]),
        ("patches_accepted_hist", [sum("box" in p for p in several) for several in patches]),
    ):
        most = max(len(case[key]), max(counts) + 1)
        expected = np.zeros(most, int)
        expected[: len(case[key])] = case[key]
        table = np.stack([np.bincount(counts, minlength=most), expected])
        table = table[:, table.sum(axis=0) > 0]
        if table.shape[1] > 1:
            assert chi2_contingency(table).pvalue > 0.001, (name, key)
        else:
            assert (table[0] > 0).all(), (name, key)
    attempted = sum(len(several) for several in patches)
    assert len(boxes) / attempted == pytest.approx(case["accept_rate"], abs=0.02)

    at = statistics["quantiles_at"]
    sizes = {
        "patch_height": [bottom - top for top, _, bottom, _ in boxes],
        "patch_width": [right - left for _, left, _, right in boxes],
    }
    shares = {
        "changed_pixel_fraction": [
            float((result.image != image).any(axis=2).mean())
            for result, image in zip(results, before, strict=True)
        ],
        "label_positive_fraction": [float((result.label > 0).mean()) for result in results],
    }
    for key, values in {**sizes, **shares}.items():
        error = np.std(values) / np.sqrt(len(values)) * np.sqrt(2)  # both means are sampled
        # Means in the file are rounded: allow half a unit of their last digit.
        assert np.mean(values) == pytest.approx(case[f"{key}_mean"], abs=4 * error + 6e-4), (
            name,
            key,
        )
        # The tails of the areas rest on few images: chance alone moves the quantiles by over 10 %.
        rng = np.random.default_rng(0)
        again = [np.quantile(rng.choice(values, len(values)), at) for _ in range(100)]
        units = [2.0] * len(at) if key in sizes else 4 * np.sqrt(2) * np.std(again, axis=0)
        for unit, ours, theirs in zip(
            units, np.quantile(values, at), case[f"{key}_quantiles"], strict=True
        ):
            assert ours == pytest.approx(theirs, rel=0.1, abs=unit), (name, key, ours, theirs)
    labels = [float(r.label[r.label > 0].mean()) for r in results if r.mask.any()]
    error = np.std(labels) / np.sqrt(len(labels)) * np.sqrt(2)
    expected_label = case["mean_label_value_where_positive"]
    assert np.mean(labels) == pytest.approx(expected_label, abs=4 * error + 0.01)
    empty = 1 - len(labels) / len(results)
    spread = np.sqrt(max(empty, case["images_without_any_positive_label"]) * 2 / number)
    assert empty == pytest.approx(case["images_without_any_positive_label"], abs=4 * spread + 1e-3)


def noise(seed: int = 0, shape: tuple[int, int] = (96, 80)) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    sharp = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return cv2.GaussianBlur(sharp, (0, 0), 1.5).astype(np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "mixed", "label": "binary"},
        {"mode": "mix", "label": "intensity"},
        {"mode": "swap", "same": True, "resize": None, "label": "binary"},
        {"mode": "uniform", "shift": False, "resize": None, "label": "continuous"},
        {"ellipses": 5},
        {"gamma": None},
        {"solver": "opencv"},
        {"background": [[0, 20], [255, 20]]},
    ],
)
def test_only_masked_and_pasted_pixels_change(options: dict[str, Any]) -> None:
    image, donor = noise(0, (160, 128)), noise(1, (160, 128))
    kept = image.copy(), donor.copy()
    num_defects = 0
    for seed in range(12):
        result = NSA(**options)(image, np.random.default_rng(seed), lambda: donor)
        again = NSA(**options)(image, np.random.default_rng(seed), lambda: donor)
        assert np.array_equal(result.image, again.image)
        assert np.array_equal(result.label, again.label)
        assert (result.image.dtype, result.image.shape) == (np.uint8, image.shape)
        assert (result.mask.dtype, result.label.dtype) == (bool, np.float32)
        assert np.array_equal(result.mask, result.label > 0)
        inside = np.zeros(image.shape[:2], bool)
        for patch in result.info["patches"]:
            if "box" in patch:
                top, left, bottom, right = patch["box"]
                inside[top:bottom, left:right] = True
        assert np.array_equal(result.image[~inside], image[~inside])
        if options.get("label") != "intensity":  # these labels extend beyond the patches
            # As published, the median filter against speckles also fills notches.
            near = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
            assert not result.mask[~near].any()
        num_defects += int(result.mask.any())
    assert num_defects >= 6
    assert np.array_equal(image, kept[0])
    assert np.array_equal(donor, kept[1])


def test_an_empty_change_has_an_empty_label() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    for seed in range(5):
        result = NSA()(flat, np.random.default_rng(seed), lambda: flat)
        assert np.array_equal(result.image, flat)
        assert not result.mask.any()
        assert not result.label.any()
    sampled_again = NSA(require_change=2)(flat, np.random.default_rng(0), lambda: flat)
    assert not sampled_again.mask.any()


def test_require_change_samples_again() -> None:
    """Half of the donor is flat and equals the image, so some patches change nothing."""
    image = np.full((64, 64, 3), 90, np.uint8)
    donor = image.copy()
    donor[:, 40:] = noise(1, (64, 24))
    options: dict[str, Any] = {"num_patches": 1, "bounds": ((0.2, 0.3), (0.2, 0.3))}
    counts = [
        sum(
            NSA(require_change=again, **options)(
                image, np.random.default_rng(seed), lambda: donor
            ).mask.any()
            for seed in range(40)
        )
        for again in (0, 8)
    ]
    assert counts[0] < 30
    assert counts[1] > 36


def test_patches_of_an_object_image_overlap_the_object() -> None:
    """The object is a bright disc on black; every pasted patch must overlap the disc."""
    rows, columns = np.mgrid[:128, :128]
    disc = (rows - 64) ** 2 + (columns - 64) ** 2 < 40**2
    images = [np.where(disc[..., None], np.maximum(noise(s, (128, 128)), 60), 5) for s in (0, 1)]
    image, donor = (pixels.astype(np.uint8) for pixels in images)
    make = NSA(background=[(5, 20)], least_object=0.7, label="binary")  # type: ignore[arg-type]
    touched = 0
    for seed in range(20):
        result = make(image, np.random.default_rng(seed), lambda: donor)
        for patch in result.info["patches"]:
            if "box" in patch:
                top, left, bottom, right = patch["box"]
                assert disc[top:bottom, left:right].any()
                touched += 1
            else:
                assert patch["refused"]
    assert touched > 10
    black = np.zeros_like(image)
    refused = make(black, np.random.default_rng(0), lambda: black)
    assert refused.info["patches"][0]["refused"] == (
        "no source position with more than 0.7 of the patch on an object"
    )


@given(
    height=st.integers(16, 2048),
    width=st.integers(16, 2048),
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(["normal", "mixed", "swap", "uniform"]),
    solver=st.sampled_from(["own", "opencv"]),
    ellipses=st.sampled_from([0, 5]),
)
@settings(max_examples=25)
def test_any_size(
    height: int, width: int, seed: int, mode: Any, solver: Any, ellipses: int
) -> None:
    rng = np.random.default_rng(seed)
    # Width is limited, so that the largest images do not take minutes.
    shape = (height, min(width, 300), 3)
    tall = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2)]
    make = NSA(mode=mode, solver=solver, ellipses=ellipses, num_patches=2, label="binary")
    for image, donor in (tall, [pixels.swapaxes(0, 1).copy() for pixels in tall]):
        result = make(image, rng, donor.copy)
        assert result.image.shape == image.shape
        assert result.image.dtype == np.uint8


def test_patches_by_area() -> None:
    """NSA's version of CutPaste: one patch of 2 to 15 % of the image, fully inside."""
    image = noise(0, (128, 128))
    aspects = []
    for seed in range(60):
        make = preset("nsa", "cutpaste_patch")
        result = make(image, np.random.default_rng(seed))
        (patch,) = result.info["patches"]
        top, left, bottom, right = patch["box"]
        height, width = bottom - top, right - left
        assert 0.015 < height * width / 128**2 < 0.16
        assert 0 <= top < bottom <= 128
        assert 0 <= left < right <= 128
        aspects.append(width / height)
        piece = result.image[top:bottom, left:right]
        windows = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(0, 1))
        corners = (windows[..., 0, 0] == piece[0, 0]).all(axis=-1)
        assert any(
            np.array_equal(image[i : i + height, j : j + width], piece)
            for i, j in np.argwhere(corners)
        )
    assert 0.28 < min(aspects) < 0.5
    assert 2 < max(aspects) < 3.5


def test_patches_of_fewer_than_fifty_pixels_are_skipped() -> None:
    """Pixels are counted after clearing the outer ring: an 8 x 8 patch keeps 36."""
    options: dict[str, Any] = {"num_patches": 1, "resize": None, "gamma": None, "mode": "normal"}
    for half, accepted in ((4, False), (5, True)):
        share = half / 100
        make = NSA(bounds=((share, share), (share, share)), **options)
        kept = []
        for seed in range(20):
            result = make(
                noise(0, (100, 100)), np.random.default_rng(seed), lambda: noise(1, (100, 100))
            )
            (patch,) = result.info["patches"]
            whole = "box" not in patch or patch["box"][2] - patch["box"][0] == 2 * half
            kept += ["box" in patch] if whole else []
        assert set(kept) == {accepted}


def test_a_foreground_mask_needs_no_background_colour() -> None:
    rows, columns = np.mgrid[:128, :128]
    disc = (rows - 64) ** 2 + (columns - 64) ** 2 < 40**2
    images = [np.where(disc[..., None], np.maximum(noise(s, (128, 128)), 90), 5) for s in (0, 1)]
    image, donor = (pixels.astype(np.uint8) for pixels in images)
    boxes = []
    for seed in range(20):
        result = NSA(num_patches=1)(image, np.random.default_rng(seed), lambda: donor, disc)
        boxes += [patch["box"] for patch in result.info["patches"] if "box" in patch]
    assert len(boxes) > 5
    assert all(disc[top:bottom, left:right].any() for top, left, bottom, right in boxes)


def test_mistakes() -> None:
    image = noise()
    with pytest.raises(ValueError, match="pass a donor"):
        NSA()(image, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must have the image's shape"):
        NSA()(image, np.random.default_rng(0), lambda: image[:-1])
    for options, message in (
        ({"bounds": ((0.4, 0.3), (0.1, 0.2))}, "expected 0 < smallest <= largest <= 0.5"),
        ({"num_patches": 0}, "num_patches must be 1 or more"),
        ({"area": (0.5, 0.1)}, "area .*expected 0 < smallest"),
        ({"shift": False}, "set resize to null"),
        ({"label": "continuous"}, "choose mode uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            NSA(**options)
