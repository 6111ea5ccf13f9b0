"""Shared parts of all drawings: colours, font, captions and grids of panels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from anomaly_clip.files import printable
from anomaly_clip.image_formats import OWN_SOFTWARE

__all__ = ["ALARM", "INK", "Colour", "add_caption", "font", "grid", "save_drawing", "write_lines"]

Colour = tuple[int, int, int]

INK: Colour = (30, 30, 30)
"""Colour of text."""
ALARM: Colour = (190, 0, 0)
"""Colour of warnings."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return PIL's built-in font, so that drawings do not depend on installed fonts."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


def add_caption(
    image: Image.Image,
    lines: Sequence[tuple[str, Colour]],
    line_height: int,
    left: int = 4,
    above: int = 0,
    below: int = 0,
    min_width: int = 0,
) -> Image.Image:
    """Put lines of text above an image.

    Args:
        image: Any image.
        lines: Text and colour of each line.
        line_height: Pixels from one line to the next; the font is four pixels smaller.
        left: Pixels left of the text.
        above: Pixels above the first line.
        below: Pixels between the last line and the image.
        min_width: Minimum width of the result, for text that is wider than the image.
    """
    top = above + line_height * len(lines) + below
    sheet = Image.new("RGB", (max(image.width, min_width), top + image.height), "white")
    write_lines(sheet, lines, line_height, left, above)
    sheet.paste(image, (0, top))
    return sheet


def save_drawing(image: Image.Image, path: Path) -> None:
    """Save a drawing, with a mark in a PNG by which later runs tell it from a photograph."""
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("Software", OWN_SOFTWARE)
        image.save(path, pnginfo=info)
    else:
        image.save(path)


def write_lines(
    sheet: Image.Image,
    lines: Sequence[tuple[str, Colour]],
    line_height: int,
    left: int,
    above: int = 0,
) -> None:
    """Write lines of text at the top of an image; see :func:`add_caption`."""
    draw = ImageDraw.Draw(sheet)
    for number, (text, colour) in enumerate(lines):
        place = (left, above + number * line_height)
        draw.text(place, printable(text), colour, font(line_height - 4))


def grid(
    panels: Sequence[Image.Image],
    columns: int,
    gap: int = 0,
    before: int = 0,
    after: int = 0,
) -> Image.Image:
    """Arrange panels of equal size on a white sheet, row by row.

    Args:
        panels: One or more images.
        columns: Number of panels in a row.
        gap: Pixels between panels.
        before: Margin above and left of all panels in pixels.
        after: Margin below and right of all panels in pixels.
    """
    width, height = panels[0].size
    rows = -(-len(panels) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", (size[0] + before + after, size[1] + before + after), "white")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        sheet.paste(panel, (before + column * (width + gap), before + row * (height + gap)))
    return sheet
