"""What a classification takes for what, as a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from anomaly_clip.files import atomic_path, write_csv

__all__ = ["draw_confusion", "draw_patterns", "write_confusion"]

Counts = NDArray[np.int64]

LINE = 18
GAP = 8
INK = (30, 30, 30)
ALARM = (190, 0, 0)
GRID = (225, 225, 225)
DARKEST = (8, 69, 148)
"""Of a row that is all in one cell; an empty one is white."""
CELLS = 880  # pixels for all columns, more if cells would be smaller than these:
SMALLEST, LARGEST = 28, 80
FOUR = 4  # panels of patterns side by side
LEGEND = "rows: true; columns: predicted; the darker, the larger the share of the row"


def write_confusion(
    folder: Path, counts: Counts, names: Sequence[str], title: str, warning: str | None
) -> Path:
    """Write ``confusion.csv`` and draw ``confusion.png``.

    Args:
        folder: Where to.
        counts: ``(K, K)``, rows true and columns predicted; or ``(K, 2, 2)``, of each pattern, rows
            absent and present in truth, columns as predicted.
        names: Of the classes, or patterns.
        title: One line above.
        warning: One line in red.

    Returns:
        The picture.
    """
    if counts.ndim == 2:
        rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
        write_csv(folder / "confusion.csv", ["true", *names], rows)
        sheet = draw_confusion(counts, names, title, warning)
    else:
        header = ["pattern", "true_positive", "false_positive", "false_negative", "true_negative"]
        lines = (
            [name, present, wrong, missed, absent]
            for name, ((absent, wrong), (missed, present)) in zip(
                names, counts.tolist(), strict=True
            )
        )
        write_csv(folder / "confusion.csv", header, lines)
        sheet = draw_patterns(counts, names, title, warning)
    with atomic_path(folder / "confusion.png") as temporary:
        sheet.save(temporary)
    return folder / "confusion.png"


def draw_confusion(
    counts: Counts, names: Sequence[str], title: str, warning: str | None = None
) -> Image.Image:
    """Draw counts ``(K, K)``, a row a true class, a column a predicted one."""
    side = min(LARGEST, max(SMALLEST, CELLS // len(names)))
    return _framed(_matrix(counts, names, names, side), [title, LEGEND], warning)


def draw_patterns(
    counts: Counts, names: Sequence[str], title: str, warning: str | None = None
) -> Image.Image:
    """Draw counts ``(K, 2, 2)``, a small matrix a pattern."""
    words = ("absent", "present")
    panels = []
    for name, own in zip(names, counts, strict=True):
        matrix = _matrix(own, words, words, LARGEST)
        panel = Image.new("RGB", (matrix.width, matrix.height + LINE), "white")
        ImageDraw.Draw(panel).text((GAP, 0), name, INK, _font(14))
        panel.paste(matrix, (0, LINE))
        panels.append(panel)
    width, height = panels[0].size
    columns = min(FOUR, len(panels))
    sheet = Image.new(
        "RGB", (columns * (width + GAP), math.ceil(len(panels) / columns) * (height + GAP)), "white"
    )
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        sheet.paste(panel, (column * (width + GAP), row * (height + GAP)))
    return _framed(sheet, [title, LEGEND], warning)


def _framed(picture: Image.Image, lines: Sequence[str], warning: str | None) -> Image.Image:
    """Put lines of text above a picture."""
    texts = [(line, INK) for line in lines] + ([(warning, ALARM)] if warning else [])
    font = _font(14)
    widest = max(math.ceil(font.getlength(text)) for text, _ in texts)
    top = GAP + LINE * len(texts)
    width = max(picture.width, widest + 2 * GAP)
    sheet = Image.new("RGB", (width, top + picture.height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, ink) in enumerate(texts):
        draw.text((GAP, GAP // 2 + number * LINE), text, ink, font)
    sheet.paste(picture, (0, top))
    return sheet


def _matrix(counts: Counts, rows: Sequence[str], columns: Sequence[str], side: int) -> Image.Image:
    """Draw counts as a grid of squares between names, with their numbers."""
    words = _font(14)
    left, above = (
        GAP + math.ceil(max(words.getlength(name) for name in names)) + GAP
        for names in (rows, columns)
    )
    width, height = left + side * len(columns) + GAP, above + side * len(rows) + GAP
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(rows):
        draw.text((left - GAP // 2, above + side * (number + 0.5)), name, INK, words, anchor="rm")
    for number, name in enumerate(columns):
        upright = _upright(name, words)
        middle = left + round(side * (number + 0.5))
        picture.paste(upright, (middle - upright.width // 2, above - upright.height - GAP // 2))
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(sums, 1)
    for (row, column), count in np.ndenumerate(counts):
        share = float(shares[row, column])
        x, y = left + column * side, above + row * side
        colour = tuple(round(255 + (dark - 255) * share) for dark in DARKEST)
        draw.rectangle((x, y, x + side, y + side), colour, GRID)
        if count:
            ink = "white" if share > 0.5 else INK
            font = _fitting(str(count), side - 4)
            draw.text((x + side / 2, y + side / 2), str(count), ink, font, anchor="mm")
    return picture


def _upright(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a text that reads from below."""
    lying = Image.new("RGB", (math.ceil(font.getlength(text)) + 1, LINE), "white")
    ImageDraw.Draw(lying).text((0, LINE / 2), text, INK, font, anchor="lm")
    return lying.transpose(Image.Transpose.ROTATE_90)


def _fitting(text: str, width: int) -> ImageFont.FreeTypeFont:
    """Return the largest font, within reason, in which a text is not wider."""
    sizes = (
        size for size in range(min(16, width // 2), 6, -1) if _font(size).getlength(text) <= width
    )
    return _font(next(sizes, 6))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
