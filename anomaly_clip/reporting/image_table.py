"""All images of a run as columns of a table that the report page sorts and filters."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

import numpy as np

from anomaly_clip.results.finished_run import printable
from anomaly_clip.results.run_files import ImageRow

__all__ = ["MAX_BYTES", "MAX_ROWS", "build_image_table", "common_folder", "short_name"]

MAX_ROWS = 20_000
"""Number of images above which only those with the highest scores are embedded."""
MAX_BYTES = 3_000_000
"""Size of the embedded names in bytes, above which fewer images are embedded."""
NUM_PARTS = 3
"""Number of the last parts of a path that are shown where the images have no common folder."""
CODES = {"normal": "0", "anomalous": "1"}
"""Letters of decisions and labels; unknown ones are ``-``."""


def build_image_table(
    rows: Sequence[ImageRow],
    names: Sequence[str],
    cards: Mapping[tuple[str, str], int],
    drawings: Mapping[str, str] = {},
) -> dict[str, Any] | None:
    """Return the columns of the table, in the order of the listing.

    Args:
        rows: All images of the run.
        names: Categories in the order of the page.
        cards: Number of the gallery image by category and path.
        drawings: Drawing of the image by path, for images that are not in the gallery.

    Returns:
        Names, categories, scores and what else is known, by column; None without images.
    """
    if not rows:
        return None
    chosen = _most_anomalous(rows)
    numbers = {name: number for number, name in enumerate(names)}
    prefix = common_folder([row.path for row in chosen])
    is_private = _is_above_home(prefix)
    table: dict[str, Any] = {
        "total": len(rows),
        "folder": "" if is_private else _shown_folder(prefix),
        "names": [
            short_name(row.path) if is_private else printable(row.path[len(prefix) :])
            for row in chosen
        ],
        "categories": [numbers.get(row.category, -1) for row in chosen],
        "scores": _base64([row.score for row in chosen]),
        "errors": {n: printable(row.error) for n, row in enumerate(chosen) if row.error},
        "cards": {
            n: card
            for n, row in enumerate(chosen)
            if (card := cards.get((row.category, row.path))) is not None
        },
    }
    table["drawings"] = {
        n: quote(drawings[row.path])
        for n, row in enumerate(chosen)
        if n not in table["cards"] and row.path in drawings
    }
    if any(not math.isnan(row.p_value) for row in chosen):
        table["p_values"] = _base64([row.p_value for row in chosen])
    if any(row.decision for row in chosen):
        table["decisions"] = "".join(CODES.get(row.decision, "-") for row in chosen)
    if any(row.label is not None for row in chosen):
        table["labels"] = "".join("-" if row.label is None else "01"[row.label] for row in chosen)
    if any(row.kind for row in chosen):
        table["kinds"] = [printable(row.kind) for row in chosen]
    return table


def short_name(path: str) -> str:
    r"""Return the last parts of an absolute path, and other paths as they are.

    Example:
        >>> from anomaly_clip.reporting.image_table import short_name
        >>> short_name("/home/jane/nut/good/1.png"), short_name("nut/1.png"), short_name("/1.png")
        ('nut/good/1.png', 'nut/1.png', '1.png')
    """
    pure = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    if not pure.is_absolute() and ".." not in pure.parts:
        return printable(path)
    parts = [part for part in pure.parts if part not in (pure.anchor, "..")]
    return printable("/".join(parts[-NUM_PARTS:]))


def _is_above_home(folder: str) -> bool:
    """Return whether names relative to a folder could contain the name of the user."""
    home = f"{Path.home()}{os.sep}"
    return bool(folder) and (home.startswith(folder) or ".." in PurePath(folder).parts)


def _shown_folder(prefix: str) -> str:
    """Return the name of a folder, or a relative path as it is."""
    pure = PureWindowsPath(prefix) if "\\" in prefix else PurePosixPath(prefix)
    return printable(f"{pure.name}/" if pure.is_absolute() else prefix)


def _most_anomalous(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """Return the images within the limits: unreadable ones, lowest p-values, highest scores."""
    size = sum(len(row.path) + len(row.error) for row in rows)
    if len(rows) <= MAX_ROWS and size <= MAX_BYTES:
        return list(rows)

    def rank(index: int) -> tuple[bool, float, float]:
        row = rows[index]
        p_value = 1.0 if math.isnan(row.p_value) else row.p_value
        return not row.error, p_value, 0.0 if row.error else -row.score

    kept, size = [], 0
    for index in sorted(range(len(rows)), key=rank)[:MAX_ROWS]:
        size += len(rows[index].path) + len(rows[index].error)
        if size > MAX_BYTES:
            break
        kept.append(index)
    return [rows[index] for index in sorted(kept)]


def common_folder(paths: Sequence[str]) -> str:
    r"""Return the folder that all paths begin with, including its last separator.

    Example:
        >>> from anomaly_clip.reporting.image_table import common_folder
        >>> common_folder(["a/good/1.png", "a/good 2/1.png"]), common_folder(["1.png"])
        ('a/', '')
    """
    if not paths:
        return ""
    low, high = min(paths), max(paths)
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: max(low.rfind("/", 0, same), low.rfind("\\", 0, same)) + 1]


def _base64(values: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")
