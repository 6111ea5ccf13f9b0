"""A table for people in three forms: text for a terminal, Markdown, and a page of HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Line", "Note", "Sheet"]

MOST = 40
"""Categories that are printed; files have all."""
WIDEST = 10_000
"""Characters of a line that is not cut, in a file."""
AIRY = 7
"""Columns that leave room for more space between them."""
NAME = 10
"""Characters of a column of names, at least: published and difference are whole."""
STYLES = {"mean": "bold", "difference": "italic", "ours": "bold", "missing": "dim"}


class Note(NamedTuple):
    """A remark above or below a table."""

    text: str
    loud: bool = False


class Line(NamedTuple):
    """One line of a table."""

    cells: tuple[str, ...]
    kind: Literal["category", "mean", "published", "ours", "missing", "difference"]
    first: bool = False
    """Whether it begins a group of lines."""
    rank: float | None = None
    """Of a category: what the lowest are found by, if not all are printed."""


@dataclass(frozen=True)
class Sheet:
    """A table with what must be said of it.

    Args:
        title: What it shows.
        notes: What must be known before it is read.
        headings: One a column.
        lines: What is in it.
        legend: What is explained below.
        num_names: How many columns at its left hold names.
        printed: The columns that a terminal shows; None: all.
        ranked_by: What lines are ranked by, in words.
    """

    title: str
    notes: Sequence[Note]
    headings: Sequence[str]
    lines: Sequence[Line]
    legend: Sequence[Note]
    num_names: int = 1
    printed: Sequence[int] | None = None
    ranked_by: str = ""

    def print(self, console: Console) -> None:
        """Print it, of very many categories only the lowest."""
        lines, cut = self._printed_lines()
        columns = range(len(self.headings)) if self.printed is None else self.printed
        apart = 1 if len(columns) <= AIRY else 0  # the box sets them apart by one already
        table = Table(box=box.SIMPLE_HEAD, padding=(0, apart, 0, 0), pad_edge=False)
        for at in columns:
            table.add_column(
                Text(self.headings[at]),
                justify="left" if at < self.num_names else "right",
                overflow="fold",
                min_width=NAME if at < self.num_names else None,
            )
        for line in lines:
            if line.kind == "mean":
                table.add_section()
            table.add_row(*(Text(line.cells[at]) for at in columns), style=STYLES.get(line.kind))
        if not console.is_terminal:  # a file's lines are as long as they must be
            needed = console.measure(table, options=console.options.update(max_width=WIDEST))
            console.width = max(console.width, needed.maximum)
        console.print(Text(self.title, style="bold"), soft_wrap=True)
        for note in self.notes:
            console.print(_text(note), soft_wrap=True)
        console.print(table)
        for note in [*cut, *self.legend]:
            console.print(_text(note), soft_wrap=True)

    def _printed_lines(self) -> tuple[Sequence[Line], list[Note]]:
        """Return the lines to print, and what is to be said of those left out."""
        categories = [line for line in self.lines if line.kind == "category"]
        if len(categories) <= MOST:
            return self.lines, []
        ranked = sorted(categories, key=lambda line: 2.0 if line.rank is None else line.rank)
        rest = [line for line in self.lines if line.kind != "category"]
        told = f"the {MOST} lowest of {len(categories)} categories by {self.ranked_by}; "
        return [*ranked[:MOST], *rest], [Note(f"{told}--csv, --markdown and --html have all")]

    def markdown(self) -> str:
        """Return it as Markdown, names as they are."""
        edge = ["---" if at < self.num_names else "---:" for at in range(len(self.headings))]
        rows = [self.headings, *(line.cells for line in self.lines)]
        cells = [[_markdown(cell) for cell in row] for row in rows]
        for line, row in zip(self.lines, cells[1:], strict=True):
            if line.kind in ("mean", "ours"):
                row[:] = [f"**{cell}**" if cell else cell for cell in row]
        grid = [f"| {' | '.join(row)} |" for row in [cells[0], edge, *cells[1:]]]
        notes = [_emphasised(note) for note in self.notes]
        legend = [f"- {_emphasised(note)}" for note in self.legend]
        parts = [f"# {_markdown(self.title)}", *notes, "\n".join(grid), "\n".join(legend)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def html(self) -> str:
        """Return it as a page that needs nothing else."""
        environment = Environment(
            loader=PackageLoader("anomaly_clip", "report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("sheet.html.jinja").render(sheet=self)


def _text(note: Note) -> Text:
    return Text(note.text, style="bold red" if note.loud else "")


def _markdown(text: str) -> str:
    """Return a text of which nothing is taken for markup, in one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", plain)


def _emphasised(note: Note) -> str:
    return f"**{_markdown(note.text)}**" if note.loud else _markdown(note.text)
