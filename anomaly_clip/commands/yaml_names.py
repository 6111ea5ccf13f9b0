"""YAML with names of files that are not UTF-8, which YAML readers refuse.

Python stands for such bytes with surrogates (PEP 383). While YAML is read, they are replaced by
characters that nobody uses.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from anomaly_clip.documents import check_value, load_yaml

__all__ = ["read_any_name", "with_stand_ins"]

SURROGATE = re.compile("[\udc80-\udcff]")
ESCAPED_SURROGATE = re.compile(r"\\u(DC|dc)([89a-fA-F][0-9a-fA-F])")
STAND_IN = re.compile("[\U0010ff80-\U0010ffff]")
ESCAPED_STAND_IN = re.compile(r"\\U0010(FF|ff)([0-9a-fA-F]{2})")
SHIFT = 0x10FF80 - 0xDC80


def read_any_name() -> None:
    """Let the parsers of jsonargparse read options and configurations with such names."""
    from jsonargparse import get_loader, set_loader  # half a second, which --help does not need

    read = get_loader("yaml")
    if read.__module__ != __name__:  # replaced once

        def load(text: str) -> Any:
            return _restored(load_yaml(with_stand_ins(text), read))

        set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def with_stand_ins(text: str) -> str:
    """Return YAML that readers accept: other characters in place of bytes that are not UTF-8."""
    text = SURROGATE.sub(lambda match: chr(ord(match[0]) + SHIFT), text)
    return ESCAPED_SURROGATE.sub(
        lambda match: rf"\U0010{'FF' if match[1] == 'DC' else 'ff'}{match[2]}", text
    )


def _restored(value: Any) -> Any:
    check_value(value)
    if isinstance(value, str):
        text = STAND_IN.sub(lambda match: chr(ord(match[0]) - SHIFT), value)
        return ESCAPED_STAND_IN.sub(  # in a text that has no escapes, this is no character
            lambda match: rf"\u{'DC' if match[1] == 'FF' else 'dc'}{match[2]}", text
        )
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        return {_restored(key): _restored(item) for key, item in value.items()}
    return value
