from __future__ import annotations

import math
from typing import Any

import pytest

from anomaly_clip.methods.clip_ada_settings import LossSettings, MapSettings, OptimSettings


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (LossSettings, {"image_fraction": 0}, r"loss\.image_fraction must be in \(0, 1\], got 0"),
        (LossSettings, {"focal": -1}, r"model\.loss\.focal must be 0 or more, got -1"),
        (LossSettings, {"class_token": math.nan}, r"loss\.class_token must be 0 or more, got nan"),
        (MapSettings, {"eval_size": 15}, r"model\.map\.eval_size must be 16 or more, got 15"),
        (MapSettings, {"sigma": -0.1}, r"model\.map\.sigma must be 0 or more, got -0\.1"),
        (MapSettings, {"image_score": "mean"}, r"model\.map\.image_score must be one of max, "),
    ],
)
def test_bounds(kind: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(**options)


def test_bounds_themselves_are_allowed() -> None:
    assert LossSettings(focal=0, image_fraction=1).gamma == 2.0
    assert MapSettings(eval_size=16, sigma=0).image_score == "max"
    assert OptimSettings().last == 0.01
