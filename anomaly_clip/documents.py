"""YAML and JSON that other people have written, read within limits.

A few lines of YAML can stand for more nodes than memory holds, because aliases repeat what an
anchor names; deep nesting exhausts Python's stack; and an integer of hundreds of digits fits into
no number that is computed with. All of these end in a :class:`DocumentError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml

__all__ = ["DocumentError", "check_value", "check_yaml_limits", "load_json", "load_yaml"]

MAX_REPEATED = 100_000
"""Number of nodes that the aliases of a YAML document may add."""
MAX_DEPTH = 100
"""Levels of nesting."""
MAX_DIGITS = 300
"""Digits of an integer; the largest floating-point number has 309."""
BITS_PER_DIGIT = 3.4


class DocumentError(yaml.YAMLError, ValueError):
    """A document exceeds a limit, or has a value that its reader does not expect."""


def check_yaml_limits(text: str) -> None:
    r"""Check the number of nodes and the depth of a YAML document before it is loaded.

    Args:
        text: The document; one that is not valid passes, as its loader reports it better.

    Raises:
        DocumentError: If the document exceeds a limit or refers to itself.

    Example:
        >>> from anomaly_clip.documents import check_yaml_limits
        >>> check_yaml_limits("a: &a [1, 2]\nb: *a")
        >>> check_yaml_limits("a: &a [*a]")
        Traceback (most recent call last):
        anomaly_clip.documents.DocumentError: the anchor a refers to itself
    """
    if not any(mark in text for mark in "*[{-?:"):  # a single value
        return
    text = text.encode("utf-8", "replace").decode()  # names of files may contain surrogates
    try:
        _check_events(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except DocumentError:
        raise
    except yaml.YAMLError:  # the two parsers differ in what they accept
        try:
            _check_events(text, yaml.BaseLoader)
        except DocumentError:
            raise
        except yaml.YAMLError:
            pass


def load_yaml(text: str, loader: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Load a YAML document within the limits.

    Args:
        text: The document.
        loader: Function that loads it.

    Raises:
        yaml.YAMLError: If it is not valid, exceeds a limit, or has a value that does not fit its
            tag, such as ``!!timestamp x``.
    """
    check_yaml_limits(text)
    try:
        content = loader(text)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise DocumentError(f"a value does not fit its tag ({type(error).__name__})") from None
    except RecursionError:
        raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    _check_values(content)
    return content


def load_json(
    text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Load a JSON document within the limits.

    Args:
        text: The document.
        object_pairs_hook: As for :func:`json.loads`.

    Raises:
        ValueError: If it is not valid or exceeds a limit.
    """
    try:
        if object_pairs_hook is None:
            content = json.loads(text)
        else:
            content = json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # Python itself refuses integers of thousands of digits
        if "integer string conversion" in str(error):
            raise DocumentError(f"a number has more than {MAX_DIGITS} digits") from None
        raise
    _check_values(content)
    return content


def check_value(value: object) -> None:
    """Check a value that a parser of options may load as YAML once more, or convert to a float.

    Raises:
        DocumentError: If it is a number of too many digits, or a text that exceeds a limit.
    """
    if isinstance(value, str):
        digits = value.strip().lstrip("+-")
        if len(digits) > MAX_DIGITS and digits.isdigit():
            raise DocumentError(f"a number has more than {MAX_DIGITS} digits")
        check_yaml_limits(value)
    elif isinstance(value, int) and value.bit_length() > MAX_DIGITS * BITS_PER_DIGIT:
        raise DocumentError(f"a number has more than {MAX_DIGITS} digits")


def _check_events(text: str, loader: type) -> None:
    sizes: dict[str, int] = {}  # nodes below each anchor, aliases expanded
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the count at its start
    unfinished: set[str] = set()
    count = repeated = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in unfinished:
                raise DocumentError(f"the anchor {event.anchor} refers to itself")
            size = sizes.get(event.anchor or "", 1)
            count, repeated = count + size, repeated + size
            if repeated > MAX_REPEATED:
                raise DocumentError(
                    f"its aliases repeat more than {MAX_REPEATED} values: write out what is needed"
                )
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if event.anchor:
                unfinished.add(event.anchor)
            if len(open_nodes) > MAX_DEPTH:
                raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - start
                unfinished.discard(anchor)


def _check_values(content: object) -> None:
    """Check depth and numbers, level by level."""
    level, depth = [content], 0
    while level:
        if depth > MAX_DEPTH:
            raise DocumentError(f"it is nested more than {MAX_DEPTH} levels deep")
        inside: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inside += value.values()
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, int) and value.bit_length() > MAX_DIGITS * BITS_PER_DIGIT:
                raise DocumentError(f"a number has more than {MAX_DIGITS} digits")
        level, depth = inside, depth + 1
