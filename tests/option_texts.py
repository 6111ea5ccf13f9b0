"""Texts and tables of the pages in ``docs/options/``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

NOTE = "<!-- Written by python tests/option_pages.py -->"


def plain(text: str) -> str:
    """Turn the markup of docstrings into Markdown, on one line.

    Example:
        >>> plain("As :class:`~a.b.C` and\\n ``x``.")
        'As `C` and `x`.'
    """
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return " ".join(re.sub(r"``(.+?)``", r"`\1`", text).split())


def prose(text: str) -> str:
    """Return a text as a paragraph, in which ``<`` begins no element."""
    return plain(text).replace("<", "&lt;")


def cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return prose(text).replace("|", "\\|")


def links(kinds: Iterable[type], page: str = "") -> str:
    """Return links to the sections of classes."""
    names = [kind.__name__ for kind in kinds]
    return ", ".join(f"[{name}]({page}#{anchor(name)})" for name in names)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as forges form it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def first_sentence(text: str) -> str:
    """Return the first sentence of a text."""
    whole = plain(text)
    match = re.match(r"(.*?[.!?])(?=\s+[A-Z`]|$)", whole)
    return match[1] if match else whole


def summary(kind: Any) -> str:
    """Return the first paragraph of a docstring."""
    return plain((inspect.getdoc(kind) or "").partition("\n\n")[0])
