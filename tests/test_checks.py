from __future__ import annotations

from typing import Any

import pytest

from anomaly_clip.synthesis.presets import preset


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
