"""Confusion matrix of a classification, as an image and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from anomaly_clip.drawing.draw import ALARM, INK, add_caption, font, grid, save_drawing
from anomaly_clip.files import atomic_path, printable, write_csv

__all__ = ["draw_confusion", "draw_patterns", "write_confusion"]

Counts = NDArray[np.int64]

LINE_HEIGHT = 18
FONT_SIZE = LINE_HEIGHT - 4
GAP = 8
GRID_COLOUR = (225, 225, 225)
DARKEST = (8, 69, 148)
"""Colour of a cell that holds all counts of its row; an empty cell is white."""
MATRIX_SIDE = 880  # width of all columns together in pixels, as far as the cell limits permit
SMALLEST, LARGEST = 28, 80  # limits of the side of a cell in pixels
PANELS_PER_ROW = 4
LEGEND = "rows: true class; columns: predicted class; colour: fraction of the row"


def write_confusion(
    folder: Path, counts: Counts, names: Sequence[str], title: str, warning: str | None
) -> Path:
    """Write ``confusion.csv`` and draw ``confusion.png``.

    Args:
        folder: Destination of both files.
        counts: ``(K, K)``, with one row per true class and one column per predicted class; or
            ``(K, 2, 2)``, such a matrix per pattern, for the classes absent and present.
        names: Names of the classes or patterns.
        title: One line above the matrix.
        warning: Another line, in red; None for no warning.

    Returns:
        The path of the image.
    """
    if counts.ndim == 2:
        rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
        write_csv(folder / "confusion.csv", ["true", *names], rows)
        sheet = draw_confusion(counts, names, title, warning)
    else:
        header = ["pattern", "true_positive", "false_positive", "false_negative", "true_negative"]
        lines = (
            [name, true_positive, false_positive, false_negative, true_negative]
            for name, ((true_negative, false_positive), (false_negative, true_positive)) in zip(
                names, counts.tolist(), strict=True
            )
        )
        write_csv(folder / "confusion.csv", header, lines)
        sheet = draw_patterns(counts, names, title, warning)
    with atomic_path(folder / "confusion.png") as temporary:
        save_drawing(sheet, temporary)
    return folder / "confusion.png"


def draw_confusion(
    counts: Counts, names: Sequence[str], title: str, warning: str | None = None
) -> Image.Image:
    """Draw counts ``(K, K)``, one row per true class and one column per predicted class."""
    side = min(LARGEST, max(SMALLEST, MATRIX_SIDE // len(names)))
    return _titled(_matrix(counts, names, names, side), title, warning)


def draw_patterns(
    counts: Counts, names: Sequence[str], title: str, warning: str | None = None
) -> Image.Image:
    """Draw counts ``(K, 2, 2)``, one small matrix per pattern."""
    states = ("absent", "present")
    panels = [
        add_caption(_matrix(matrix, states, states, LARGEST), [(name, INK)], LINE_HEIGHT, GAP)
        for name, matrix in zip(names, counts, strict=True)
    ]
    columns = min(PANELS_PER_ROW, len(panels))
    return _titled(grid(panels, columns, GAP, after=GAP), title, warning)


def _titled(image: Image.Image, title: str, warning: str | None) -> Image.Image:
    """Put title, legend and warning above an image, which is widened if necessary."""
    lines = [(title, INK), (LEGEND, INK), *([(warning, ALARM)] if warning else [])]
    widest = max(math.ceil(font(FONT_SIZE).getlength(text)) for text, _ in lines)
    half = GAP // 2
    return add_caption(image, lines, LINE_HEIGHT, GAP, half, half, min_width=widest + 2 * GAP)


def _matrix(counts: Counts, rows: Sequence[str], columns: Sequence[str], side: int) -> Image.Image:
    """Draw counts as a grid of coloured squares with row and column names."""
    letters = font(FONT_SIZE)
    rows, columns = ([printable(name) for name in names] for names in (rows, columns))
    left, above = (
        GAP + math.ceil(max(letters.getlength(name) for name in names)) + GAP
        for names in (rows, columns)
    )
    width, height = left + side * len(columns) + GAP, above + side * len(rows) + GAP
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number, name in enumerate(rows):
        draw.text((left - GAP // 2, above + side * (number + 0.5)), name, INK, letters, anchor="rm")
    for number, name in enumerate(columns):
        rotated = _vertical_text(name)
        middle = left + round(side * (number + 0.5))
        image.paste(rotated, (middle - rotated.width // 2, above - rotated.height - GAP // 2))
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(sums, 1)
    for (row, column), count in np.ndenumerate(counts):
        share = float(shares[row, column])
        x, y = left + column * side, above + row * side
        colour = tuple(round(255 + (dark - 255) * share) for dark in DARKEST)
        draw.rectangle((x, y, x + side, y + side), colour, GRID_COLOUR)
        if count:
            ink = "white" if share > 0.5 else INK
            fitting = _fitting_font(str(count), side - 4)
            draw.text((x + side / 2, y + side / 2), str(count), ink, fitting, anchor="mm")
    return image


def _vertical_text(text: str) -> Image.Image:
    """Draw a text that reads from bottom to top."""
    letters = font(FONT_SIZE)
    horizontal = Image.new("RGB", (math.ceil(letters.getlength(text)) + 1, LINE_HEIGHT), "white")
    ImageDraw.Draw(horizontal).text((0, LINE_HEIGHT / 2), text, INK, letters, anchor="lm")
    return horizontal.transpose(Image.Transpose.ROTATE_90)


def _fitting_font(text: str, width: int) -> ImageFont.FreeTypeFont:
    """Return the largest font of 6 to 16 pixels in which a text fits into a width."""
    sizes = (
        size for size in range(min(16, width // 2), 6, -1) if font(size).getlength(text) <= width
    )
    return font(next(sizes, 6))
