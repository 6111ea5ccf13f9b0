"""Text of the records of a run, as pairs of name and value."""

from __future__ import annotations

from typing import Any

import pytest

from anomaly_clip.reporting.protocol_text import MAX_ENTRIES, protocol_text, record_text, value_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "yes"),
        (0.123456789, "0.123457"),
        (12, "12"),
        ([], "none"),
        (["a", 1, False], "a, 1, no"),
        ({"x": None, "y": 0.5}, "x: none, y: 0.5"),
        ([{"x": 1}, {"x": 2}], "x: 1; x: 2"),
        ("a\x1bb", "a\ufffdb"),
    ],
)
def test_values(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_long_lists_are_cut() -> None:
    whole, longer = (value_text(list(range(MAX_ENTRIES + more))) for more in (0, 3))
    assert whole.count(",") == MAX_ENTRIES - 1
    assert longer == f"{whole}, and 3 more"


def test_counts_are_left_out_and_unknown_values_are_named() -> None:
    protocol = {
        "images": {"nut": 3},
        "anomalous": {"nut": 1},
        "words": {"nut": "nut"},
        "overlap": None,
        "borrowed": "visa.pth",
        "auxiliary": None,
        "one_model_a_category": True,
    }
    assert dict(protocol_text(protocol)) == {
        "category names": "same as the categories",
        "overlap": "not checked",
        "borrowed": "visa.pth",
        "auxiliary": "unknown",
        "one model per category": "yes",
    }
    assert protocol_text({"words": {"nut": "metal nut"}}) == [("category names", "nut: metal nut")]
    assert record_text({"pretrained": "demo"}) == [("pretrained", "demo")]
