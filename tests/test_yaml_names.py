from __future__ import annotations

import os
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from anomaly_clip.commands.yaml_names import read_any_name

NAME = os.fsdecode(b"gr\xfcn")


@pytest.mark.parametrize(
    "value",
    [
        {"root": f"/data/{NAME}"},
        {NAME: [NAME, "é", "x\ny"]},
        {"text": r"\udce9 and \uDCFF in single quotes"},
    ],
)
def test_configurations_come_back(value: dict[str, Any]) -> None:
    read_any_name()
    read_any_name()
    text = yaml.safe_dump(value, allow_unicode=True)
    assert get_loader("yaml")(text) == value


@pytest.mark.parametrize("text", [NAME, f"[{NAME}, b]", f"{{a: {NAME}}}", "é", "12", "null"])
def test_values_of_options(text: str) -> None:
    read_any_name()
    expected = {
        f"[{NAME}, b]": [NAME, "b"],
        f"{{a: {NAME}}}": {"a": NAME},
        "12": 12,
        "null": None,
    }.get(text, text)
    assert get_loader("yaml")(text) == expected
