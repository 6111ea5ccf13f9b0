from __future__ import annotations

import math
from typing import Any

import pytest

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods import CLIPADA
from anomaly_clip.methods.clip_ada_settings import LossSettings, MapSettings, OptimSettings


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LossSettings, {"image_fraction": 0}, r"loss\.image_fraction must be in \(0, 1\], got 0"),
        (LossSettings, {"focal": -1}, r"model\.loss\.focal must be 0 or more, got -1"),
        (LossSettings, {"class_token": math.nan}, r"loss\.class_token must be 0 or more, got nan"),
        (MapSettings, {"eval_size": 15}, r"model\.map\.eval_size must be 16 or more, got 15"),
        (MapSettings, {"sigma": -0.1}, r"model\.map\.sigma must be 0 or more, got -0\.1"),
        (MapSettings, {"image_score": "mean"}, r"model\.map\.image_score must be one of max, "),
    ],
)
def test_bounds(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_bounds_themselves_are_allowed() -> None:
    assert LossSettings(focal=0, image_fraction=1).gamma == 2.0
    assert MapSettings(eval_size=16, sigma=0).image_score == "max"
    assert OptimSettings().last == 0.01


def tiny(clip: CLIPBackbone, **options: Any) -> CLIPADA:
    return CLIPADA(clip, **{"feature_layer": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"model.tau must be in \[0.01, 1.0\], got 0.0"),
        ({"taps": [1, 3]}, r"model.taps \[1, 3\]: model.feature_layer 2 is missing"),
        ({"feature_layer": 9}, "expected ascending numbers between 1 and 4"),
        ({"feature_layer": 4}, "needs 1 blocks after model.feature_layer 4"),
    ],
)
def test_invalid_arguments_are_named(
    tiny_clip: CLIPBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tiny_clip, **options)


def test_rates_and_decay_by_group(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip, learn_tau=True)
    names = {id(p): name for name, p in method.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in method.parameter_groups(0.5)
        for p in group["params"]
    }
    assert set(rates) == {name for name, p in method.named_parameters() if p.requires_grad}
    assert rates["prompt.context"] == (2e-3, 0)
    assert rates["heads.0.linear.weight"] == (1e-3, 0.5)
    for name in ("heads.0.linear.bias", "refinement.shift", "refinement.beta", "log_tau"):
        assert rates[name] == (1e-3, 0)
    assert rates["refinement.blocks.0.attn.in_proj_weight"] == (1e-4, 0.5)
    assert rates["refinement.blocks.0.ln_1.weight"] == (1e-4, 0)
