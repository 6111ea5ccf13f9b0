"""Copies that a file manager made of a file, such as ``a (copy).png`` next to ``a.png``.

A file is a copy if its name has such a form and its content equals that of the original in the same
folder. Only files with names of such a form are compared.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable
from pathlib import Path

from anomaly_clip.data.samples import Sample

__all__ = ["original_of", "plain_name", "split_copies", "with_copy_mark"]

WORD = r"(?:copy|copia|kopie)"
BEHIND = re.compile(
    rf"(?:\s?\(\d+\)|\s\((?:\d+\w\w |another )?{WORD}(?: \d+)?\)|\s-\s{WORD}(?:\s?\(\d+\))?"
    rf"|[\s_-]{WORD}(?: ?\d+)?)(?=$|[_.-])",
    re.IGNORECASE,
)
"""``a (1)``, ``a (copy)``, ``a (another copy)``, ``a (3rd copy)``, ``a - Copy (2)``, ``a copy``."""
BEFORE = re.compile(rf"^{WORD}(?: ?\(\d+\))? (?:of|von|de) ", re.IGNORECASE)
"""``Copy of a``, ``Copy (2) of a``."""


def plain_name(stem: str) -> str:
    """Return a name without the marks of copies; the same name if it has none.

    Example:
        >>> from anomaly_clip.data.copies import plain_name
        >>> plain_name("a (copy)"), plain_name("a_mask - Copy (2)"), plain_name("Copy of a")
        ('a', 'a_mask', 'a')
        >>> plain_name("a (1)_mask"), plain_name("copyright"), plain_name("part 1")
        ('a_mask', 'copyright', 'part 1')
    """
    return BEHIND.sub("", BEFORE.sub("", stem)) or stem


def with_copy_mark(stem: str, ending: str) -> str | None:
    """Return a copy's name with an ending before the mark: ``a (copy)`` gives ``a_GT (copy)``."""
    mark = re.search(rf"{BEHIND.pattern}$", stem, re.IGNORECASE)
    return None if mark is None else f"{stem[: mark.start()]}{ending}{mark[0]}"


def original_of(path: Path) -> Path | None:
    """Return the file in the same folder of which a file is a copy; None if it is no copy."""
    name = plain_name(path.stem)
    if name == path.stem:
        return None
    for suffix in dict.fromkeys((path.suffix, path.suffix.lower(), path.suffix.upper())):
        original = path.with_name(name + suffix)
        try:
            if original.is_file() and filecmp.cmp(original, path, shallow=False):
                return original
        except OSError:  # an unreadable file is reported when it is used
            continue
    return None


def split_copies(samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that are not copies of another file, and those that are."""
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        parts[original_of(sample.image) is not None].append(sample)
    return parts
