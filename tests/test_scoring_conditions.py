"""Tests of the conditions under which scores are comparable."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anomaly_clip.errors import UserError
from anomaly_clip.methods import SDP, PatchCore
from anomaly_clip.recording.scoring_conditions import check_conditions, scoring_conditions


def conditions(method: Any, categories: tuple[str, ...] = ("nut",), **changes: Any) -> dict:
    values: dict[str, Any] = {
        "image_size": method.image_size,
        "resize": "square",
        "bit_depth": None,
        "precision": "32-true",
    }
    return scoring_conditions(method, **{**values, **changes}, categories=categories)


def patchcore(**options: Any) -> PatchCore:
    torch.manual_seed(0)
    backbone = {"name": "squeezenet1_1", "weights": "random"}
    return PatchCore(backbone, layers=["features.3"], image_size=32, **options)  # type: ignore[arg-type]


def test_equal_conditions_pass() -> None:
    check_conditions(conditions(patchcore()), conditions(patchcore()), "the calibration")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 64}, "^model.image_size is 64, but the file was made with 32"),
        ({"resize": "crop"}, "^data.resize is crop"),
        ({"bit_depth": 12}, "^these images have 12 bits per channel, but those of the file had 8"),
        ({"precision": "bf16-mixed"}, "^trainer.precision is bf16-mixed"),
    ],
    ids=str,
)
def test_another_preprocessing_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_conditions(conditions(patchcore()), conditions(patchcore(), **changes), "the file")


def test_another_bit_depth_is_an_option() -> None:
    before, now = (conditions(patchcore(), bit_depth=bits) for bits in (10, 8))
    with pytest.raises(UserError, match=r"^data.bit_depth is 8, but the file was made with 10"):
        check_conditions(before, now, "the file")


def test_reference_images_are_a_condition() -> None:
    method, zero_shot = patchcore(), conditions(patchcore(), ("nut", "screw"))
    assert zero_shot["references"] == {"nut": [], "screw": []}
    method.reference_paths = {"nut": ["b", "a"]}  # generated images, which are no files
    before = conditions(method)
    assert before["references"] == {"nut": ["a", "b"]}
    check_conditions(before, conditions(method), "the file")
    with pytest.raises(UserError, match="nut is compared with 0 reference images, but the file wa"):
        check_conditions(before, conditions(patchcore()), "the file")
    with pytest.raises(UserError, match=r"nut is compared with 2 reference images, .* with 0 ref"):
        check_conditions(zero_shot, before, "the file")
    method.reference_paths = {"nut": ["a", "c"]}
    with pytest.raises(UserError, match="the reference images of nut differ from those of the"):
        check_conditions(before, conditions(method), "the file")
    method.reference_paths = {"folder": ["a", "c"]}  # decided by the only category's calibration
    with pytest.raises(UserError, match="the reference images of folder differ"):
        check_conditions(before, conditions(method, ("folder",)), "the file")


def test_other_settings_and_weights_are_named() -> None:
    before = conditions(patchcore())
    with pytest.raises(UserError, match=r"model.num_neighbours is 3, but the file was made with 9"):
        check_conditions(before, conditions(patchcore(num_neighbours=3)), "the file")
    other = patchcore()
    other.bank = torch.ones(2, 3)
    with pytest.raises(UserError, match="the fitted weights differ: calibrate again"):
        check_conditions(before, conditions(other), "the file")
    moved = {**before, "backbone_sha256": "0"}
    with pytest.raises(UserError, match="the weights of the backbone differ"):
        check_conditions(moved, before, "the file")


def test_evaluator_and_place_of_the_weights_do_not_matter() -> None:
    before, method = conditions(patchcore()), patchcore()
    assert "evaluator" not in before["settings"]
    assert "weights" not in before["settings"]["backbone"]
    assert before["words"] == {}
    check_conditions(before, conditions(method, ("screw",)), "the file")


def test_names_in_prompts_are_a_condition() -> None:
    method = SDP({"name": "demo", "pretrained": "demo"})  # type: ignore[arg-type]
    before = conditions(method, ("nut", "screw"))
    check_conditions(before, conditions(method, ("nut",)), "the file")
    method.words = lambda category: f"big {category}"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the name in prompts of nut"):
        check_conditions(before, conditions(method, ("nut",)), "the file")
