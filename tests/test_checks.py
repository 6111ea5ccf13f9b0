from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from anomaly_clip.synthesis.checks import check_fields, check_image
from anomaly_clip.synthesis.presets import preset


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("perlin", {"source": "dtd"}, "source 'dtd': expected one of folder, self, noise, code"),
        ("perlin", {"num_changes": 2.5}, "num_changes 2.5: expected a whole number"),
        ("perlin", {"folder": 5}, "folder 5: expected a string or null"),
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
def test_options_are_typed(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(recipe, options=options)


@dataclass(frozen=True)
class Settings:
    count: int = 1
    share: float = 0.5
    bounds: tuple[float, float] = (0.0, 1.0)
    steps: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    folder: str | None = None
    on: bool = True
    nested: tuple[tuple[int, int], ...] = ()


def test_lists_from_yaml_become_tuples() -> None:
    options: dict[str, Any] = {"bounds": [1, 2.5], "steps": [1, 2, 3], "nested": [[1, 2], [3, 4]]}
    settings = Settings(**options)
    check_fields(settings)
    assert settings == Settings(bounds=(1, 2.5), steps=(1, 2, 3), nested=((1, 2), (3, 4)))
    check_fields(Settings(share=1))  # a whole number is a number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1.0}, "count 1.0: expected a whole number"),
        ({"count": True}, "count True: expected a whole number"),
        ({"share": "1"}, "share '1': expected a number"),
        ({"share": float("nan")}, "share nan: expected a number"),
        ({"share": float("inf")}, "share inf: expected a number"),
        ({"bounds": [1]}, r"bounds \(1,\): expected \[a number, a number\]"),
        ({"bounds": 3}, r"bounds 3: expected \[a number, a number\]"),
        ({"steps": [1, 2.5]}, r"steps \(1, 2.5\): expected a list of a whole number"),
        ({"kind": "c"}, "kind 'c': expected one of a, b"),
        ({"folder": 3}, "folder 3: expected a string or null"),
        ({"on": 1}, "on 1: expected true or false"),
        ({"nested": [[1, 2, 3]]}, r"expected a list of \[a whole number, a whole number\]"),
    ],
)
def test_a_field_of_another_type_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fields(Settings(**options))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
    ],
)
def test_an_image_is_uint8_with_three_channels(image: Any) -> None:
    check_image(np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\) of at least 1 x 1 pixels, got"):
        check_image(image)
