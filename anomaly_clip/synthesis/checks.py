"""Checks of a recipe's settings and input image.

Settings are checked here rather than by jsonargparse, which accepts NaN and the string "2" as
numbers and whose messages name Python types.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_fields", "check_image"]


def check_fields(settings: Any) -> None:
    """Check a frozen dataclass against its annotations; lists become tuples.

    Raises:
        ValueError: If a field has the wrong type.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = _tuples(getattr(settings, field.name)), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"{field.name} {value!r}: expected {_described(hint)}")
        object.__setattr__(settings, field.name, value)


def check_image(image: NDArray[np.uint8]) -> None:
    """Raise a ValueError unless an image is uint8 ``(H, W, 3)`` and not empty."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"expected an image uint8 (H, W, 3) of at least 1 x 1 pixels, got {image.dtype} "
            f"{tuple(image.shape)}: convert it, as with anomaly_clip.images.read_image"
        )


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(element, parts[0]) for element in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        return f"a list of {_described(parts[0])}"
    if kind is tuple:
        return f"[{', '.join(_described(part) for part in parts)}]"
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
    return names.get(hint, "null")


def _tuples(value: Any) -> Any:
    return (
        tuple(_tuples(element) for element in value) if isinstance(value, (list, tuple)) else value
    )
