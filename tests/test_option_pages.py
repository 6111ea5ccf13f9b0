"""``docs/options/`` is up to date with the parsers, signatures and docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from option_pages import FOLDER, PAGES, Option, default_words, page, type_words
from option_texts import cell, first_sentence

from anomaly_clip.data import Resize


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == page(name), "renew it: python tests/option_pages.py"


def test_no_other_page_is_there() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(PAGES)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "integer"),
        (bool | None, "true or false, or `null`"),
        (list[str], "list of texts"),
        (list[dict], "list of mappings"),
        (dict[str, str], "mapping"),
        (Literal["a", "b"], "`a`, `b`"),
        (Literal["auto"] | int, "`auto` or integer"),
        (Resize, "[Resize](#resize)"),
        (Path, "path"),
    ],
)
def test_types_in_words(annotation: object, words: str) -> None:
    assert type_words(annotation) == words


@pytest.mark.parametrize(
    ("annotation", "default", "words"),
    [
        (int, 3, "`3`"),
        (bool, False, "`false`"),
        (str, "", '`""`'),
        (list[str], ["a", "b"], "`[a, b]`"),
        (list[int], [1, 2, 3, 4, 5], "`[1, 2, ...]`"),
        (Resize, Resize(), "its defaults"),
        (Resize, Resize("shorter_crop", 256), "`{rule: shorter_crop, size: 256}`"),
    ],
)
def test_defaults_in_words(annotation: object, default: object, words: str) -> None:
    assert default_words(Option("name", annotation, default, "")) == words


def test_texts() -> None:
    assert cell("See :func:`~a.b`,\n``x | y`` and <z>.") == "See `b`, `x \\| y` and &lt;z>."
    assert first_sentence("Layers, e.g. two.\n\n Default: 3.") == "Layers, e.g. two."
