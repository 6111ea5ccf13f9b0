"""Warnings that are shown next to metrics."""

from __future__ import annotations

import pytest

from anomaly_clip.results.warnings import (
    DEMO_REMARK,
    RANDOM_WARNING,
    rounds_remark,
    selection_warning,
    weights_remark,
)


@pytest.mark.parametrize(
    ("weights", "remark"),
    [
        ({"pretrained": "random", "random": True}, RANDOM_WARNING),
        ({"pretrained": "demo", "random": False}, DEMO_REMARK),
        ({"pretrained": "openai", "random": False}, None),
        ({}, None),
    ],
)
def test_random_and_demo_weights_have_a_warning(
    weights: dict[str, object], remark: str | None
) -> None:
    assert weights_remark(weights) == remark


def test_an_epoch_selected_on_the_test_images() -> None:
    assert "the metrics are too optimistic" in str(selection_warning({"select": "best_test"}))
    assert selection_warning({"select": "last"}) is None


def test_means_of_rounds_have_their_deviation() -> None:
    spread = {"image_auroc": 0.0123, "pixel_auroc": None, "pixel_ap": 0.5}
    remark = rounds_remark({"rounds": 10, "spread": spread})
    assert remark == "means over 10 rounds; standard deviation of image AUROC 1.2"
    assert rounds_remark({"rounds": 2}) == "means over 2 rounds"
    assert rounds_remark({"rounds": 1, "spread": spread}) is None
    assert rounds_remark({}) is None
