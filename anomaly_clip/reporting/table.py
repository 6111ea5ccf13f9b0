"""Readable table in three formats: terminal text, Markdown and HTML."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip.progress import show_table
from anomaly_clip.reporting.templates import render

__all__ = ["ReportTable", "TableLine", "TableNote", "has_mark"]

MAX_PRINTED = 40
"""Maximum number of categories that are printed; files list all of them."""
MAX_PADDED = 7
"""Number of columns above which a printed table has no extra space between columns."""
NAME_WIDTH = 10
"""Minimum width of a name column, so that "published" and "difference" are not wrapped."""
STYLES = {"mean": "bold", "difference": "italic", "ours": "bold", "missing": "dim"}
"""Terminal style of a line, by its kind."""


class TableNote(NamedTuple):
    """A remark above or below a table."""

    text: str
    loud: bool = False
    mark: str = ""
    """Mark at the start of cells that the remark explains; it is printed only next to such cells.
    """


class TableLine(NamedTuple):
    """One line of a table."""

    cells: tuple[str, ...]
    kind: Literal["category", "mean", "published", "ours", "missing", "difference", "item"]
    first: bool = False
    """True for the first line of a group."""
    rank: float | None = None
    """Value that the lines are ranked by if only the lowest categories are printed."""


@dataclass(frozen=True)
class ReportTable:
    """A table with its title and notes.

    Args:
        title: Heading of the table.
        notes: Remarks above the table.
        headings: One heading per column.
        lines: Lines of the table.
        legend: Explanations below the table.
        num_names: Number of leading columns that hold names.
        printed: Columns shown in a terminal; None: all.
        ranked_by: Name of the value in `TableLine.rank`.
    """

    title: str
    notes: Sequence[TableNote]
    headings: Sequence[str]
    lines: Sequence[TableLine]
    legend: Sequence[TableNote]
    num_names: int = 1
    printed: Sequence[int] | None = None
    ranked_by: str = ""

    def print(self, console: Console | None = None) -> None:
        """Print the table; at most `MAX_PRINTED` categories, those with the lowest values.

        Args:
            console: Where to print; default: standard output.
        """
        lines, omission_notes = self._printed_lines()
        columns = range(len(self.headings)) if self.printed is None else self.printed
        padding = 1 if len(columns) <= MAX_PADDED else 0  # in addition to one space from the box
        table = Table(box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False)
        for column in columns:
            is_name = column < self.num_names
            table.add_column(
                Text(self.headings[column]),
                justify="left" if is_name else "right",
                overflow="fold",
                min_width=NAME_WIDTH if is_name else None,
            )
        for line in lines:
            if line.kind == "mean":
                table.add_section()
            cells = (Text(line.cells[column]) for column in columns)
            table.add_row(*cells, style=STYLES.get(line.kind))
        console = console or Console(highlight=False)
        console.print(Text(self.title, style="bold"), soft_wrap=True)
        for note in self.notes:
            values = [column for column in columns if column >= self.num_names]
            if not note.mark or has_mark(lines, note.mark, values):
                console.print(_note_text(note), soft_wrap=True)
        show_table(table, console)
        for note in [*omission_notes, *self.legend]:
            console.print(_note_text(note), soft_wrap=True)

    def _printed_lines(self) -> tuple[Sequence[TableLine], list[TableNote]]:
        """Return the lines to print, and a note on those left out."""
        categories = [line for line in self.lines if line.kind == "category"]
        if len(categories) <= MAX_PRINTED:
            return self.lines, []
        ranked = sorted(categories, key=lambda line: 2.0 if line.rank is None else line.rank)
        rest = [line for line in self.lines if line.kind != "category"]
        note = (
            f"shown: the {MAX_PRINTED} of {len(categories)} categories with the lowest "
            f"{self.ranked_by}; --csv, --markdown and --html write all categories"
        )
        return [*ranked[:MAX_PRINTED], *rest], [TableNote(note)]

    def markdown(self) -> str:
        """Return the table as Markdown; names are escaped."""
        separator = ["---" if n < self.num_names else "---:" for n in range(len(self.headings))]
        rows = [self.headings, *(line.cells for line in self.lines)]
        cells = [[_escape_markdown(cell) for cell in row] for row in rows]
        for line, row in zip(self.lines, cells[1:], strict=True):
            if line.kind in ("mean", "ours"):
                row[:] = [f"**{cell}**" if cell else cell for cell in row]
        grid = [f"| {' | '.join(row)} |" for row in [cells[0], separator, *cells[1:]]]
        notes = [_markdown_note(note) for note in self.notes]
        legend = [f"- {_markdown_note(note)}" for note in self.legend]
        parts = [f"# {_escape_markdown(self.title)}", *notes, "\n".join(grid), "\n".join(legend)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def text(self) -> str:
        """Return the table as plain text, as :meth:`print` prints it."""
        console = Console(file=io.StringIO(), highlight=False, color_system=None)
        with console.capture() as captured:
            self.print(console)
        return captured.get().rstrip("\n")

    def html(self) -> str:
        """Return the table as a self-contained HTML page."""
        return render("table.html.jinja", table=self)

    def fragment(self) -> str:
        """Return the table as HTML for a place in another page, such as a notebook."""
        return render("table_fragment.html.jinja", table=self)


def has_mark(lines: Sequence[TableLine], mark: str, columns: Sequence[int]) -> bool:
    """Return whether any cell of the columns starts with a mark."""
    return any(line.cells[column].startswith(mark) for line in lines for column in columns)


def _note_text(note: TableNote) -> Text:
    return Text(note.text, style="bold red" if note.loud else "")


def _escape_markdown(text: str) -> str:
    """Return a text as one line with all markup escaped."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def _markdown_note(note: TableNote) -> str:
    text = _escape_markdown(note.text)
    return f"**{text}**" if note.loud else text
