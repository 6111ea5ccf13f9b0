"""Progress of long steps: a bar on a terminal, occasional log lines elsewhere."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from anomaly_clip.files import readable

__all__ = [
    "Clock",
    "LogProgress",
    "counted",
    "duration",
    "muted",
    "number_of",
    "rate",
    "say",
    "sees_bars",
    "show_below",
    "show_table",
    "silence",
    "track",
]

Item = TypeVar("Item")
Clock = Callable[[], float]
"""Returns the seconds since an arbitrary start, such as :func:`time.monotonic`."""

FIRST_LINE = 10.0
"""Seconds before the first line of a step; most steps finish earlier."""
LINE_INTERVAL = 30.0
"""Minimum seconds between two lines."""
LINE_SHARE = 0.1
"""Minimum time between two lines, as a fraction of the elapsed time."""
BAR_INTERVAL = 0.1
"""Minimum seconds between two refreshes of a bar."""
MAX_WIDTH = 10_000
"""Maximum width of a table that is written to a file, in characters."""
NAME_WIDTH = 10
"""Width to which a column of names is folded in a narrow terminal."""

_silent = False
_muted = False
_displays: list[Progress] = []
"""The display that ``track`` has started, if any: a second one would overwrite it."""
_find_display: Callable[[], Progress | None] | None = None
"""Returns the display of another library, such as Lightning's."""


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, or an empty text while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate(speed), style="progress.data.speed")


class LogProgress:
    """Log-style progress of a long step, for non-interactive output.

    The first line is written after ten seconds; the interval then grows with the elapsed time.

    Args:
        title: Name of the step.
        clock: Returns the time in seconds.
    """

    def __init__(self, title: str, clock: Clock = time.monotonic) -> None:
        self.title = title
        self._clock = clock
        self._begun = clock()
        self._next = self._begun + FIRST_LINE

    @property
    def due(self) -> bool:
        """True if the next line is due; cheap enough to check for every item."""
        return self._clock() >= self._next

    def log(
        self,
        done: float,
        total: float | None = None,
        where: str | None = None,
        more: Iterable[str] = (),
    ) -> None:
        """Write a line.

        Args:
            done: Items done since the start of the step.
            total: Number of items; None or infinity if unknown.
            where: Description of the position; default: ``done`` of ``total``.
            more: Further parts of the line.
        """
        now = self._clock()
        passed = now - self._begun
        self._next = now + max(LINE_INTERVAL, LINE_SHARE * passed)
        parts = [counted(done, total) if where is None else where]
        if done > 0 and passed > 0:
            parts.append(rate(done / passed))
            if total is not None and done < total < math.inf:
                parts.append(f"{duration((total - done) * passed / done)} left")
        say(f"{self.title}: {', '.join([*parts, *more])}")

    def end(self, done: str) -> None:
        """Write the last line, with the elapsed time, unless the step was too short for lines."""
        passed = self._clock() - self._begun
        if passed >= FIRST_LINE:
            say(f"{self.title}: {done} in {duration(passed)}")


def silence(silent: bool) -> None:
    """Turn the progress of long steps off or on; ``say`` is not affected."""
    global _silent
    _silent = silent


@contextmanager
def muted() -> Iterator[None]:
    """Show neither messages nor progress within the ``with`` block."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def track(
    items: Iterable[Item],
    title: str,
    total: int | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Item]:
    """Yield the items, and show the progress if this is the first process.

    Args:
        items: Any items.
        title: Name of the step.
        total: Number of items; needed only if ``items`` has no length.
        clock: Returns the time in seconds.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _silent or _muted or not _is_first_process() or total == 0:
        yield from items
    elif sees_bars():
        yield from _with_bar(items, title, total, clock)
    else:
        yield from _with_lines(items, title, total, clock)


def _with_bar(items: Iterable[Item], title: str, total: int | None, clock: Clock) -> Iterator[Item]:
    with _display() as progress:
        # An unknown total is None in our own display, and infinity in Lightning's.
        unknown = None if progress in _displays else math.inf
        bar = progress.add_task(escape(title), total=unknown if total is None else total)
        try:
            due = -math.inf
            for done, item in enumerate(items, start=1):
                yield item
                if clock() >= due:
                    progress.update(bar, completed=done, refresh=True)
                    due = clock() + BAR_INTERVAL
        finally:
            progress.remove_task(bar)
            progress.refresh()


def _with_lines(
    items: Iterable[Item], title: str, total: int | None, clock: Clock
) -> Iterator[Item]:
    lines, done = LogProgress(title, clock), 0
    for done, item in enumerate(items, start=1):
        yield item
        if lines.due and done != total:
            lines.log(done, total)
    lines.end(f"{done:,}")


@contextmanager
def _display() -> Iterator[Progress]:
    """Yield the display on the screen, or a new one."""
    running = _running_display()
    if running is not None:
        yield running
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        _displays.append(progress)
        try:
            yield progress
        finally:
            _displays.remove(progress)


def _running_display() -> Progress | None:
    if _displays:
        return _displays[-1]
    return None if _find_display is None else _find_display()


def show_below(find: Callable[[], Progress | None]) -> None:
    """Show bars in another library's display whenever it is on the screen.

    Args:
        find: Returns the display, or None while it is not shown.
    """
    global _find_display
    _find_display = find


def sees_bars() -> bool:
    """Return whether standard error can show bars: on a terminal, or in a notebook with widgets."""
    if _muted:
        return False
    console = Console(stderr=True)
    has_widgets = importlib.util.find_spec("ipywidgets") is not None  # without them, rich warns
    return console.is_interactive or (console.is_jupyter and has_widgets)


def _is_first_process() -> bool:
    """Return whether this process has rank 0; without Lightning there is only one process."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return lightning is None or lightning.rank_zero_only.rank == 0


def say(text: str, style: str | None = None) -> None:
    """Write a message to standard error (standard output is for results), on rank 0 only."""
    if _muted or not _is_first_process():
        return
    running = _running_display()
    # In a notebook, rich would print HTML to the cell's results.
    console = Console(stderr=True, force_jupyter=False) if running is None else running.console
    # File names and categories may contain brackets and colons.
    console.print(
        readable(text), style=style, highlight=False, soft_wrap=True, markup=False, emoji=False
    )


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table without cutting a cell, whatever the width of the terminal.

    In a file, lines are as long as necessary. In a narrow terminal, names are folded; if that is
    not enough, each row becomes a block with one line per column.

    Args:
        table: The table; its left-aligned columns have names.
        console: Console to print to; default: standard output.
    """
    console = console or Console(highlight=False)
    options = console.options.update(max_width=MAX_WIDTH)
    excess = console.measure(table, options=options).maximum - console.width
    if excess > 0 and not console.is_terminal:
        console.width += excess
    elif excess > 0:
        slack = 0
        for column in table.columns:
            if column.justify == "left":
                cells = (console.measure(cell, options=options).maximum for cell in column.cells)
                slack += max(0, max(cells, default=0) - NAME_WIDTH)
            else:
                column.no_wrap = True
        if slack < excess:
            _print_blocks(table, console)
            return
    console.print(table, soft_wrap=False)


def _print_blocks(table: Table, console: Console) -> None:
    """Print each row of a table as a block: the first cell, then the others by their headings."""
    headings = [_joined_heading(str(column.header)) for column in table.columns]
    if table.title:
        console.print(table.title, style=table.title_style or "", soft_wrap=True)
    width = max((len(heading) for heading in headings[1:]), default=0)
    cells = zip(*(column.cells for column in table.columns), strict=True)
    for row, (name, *values) in zip(table.rows, cells, strict=True):
        console.print()
        console.print(Text(headings[0] + " ") + Text(str(name), "bold"), soft_wrap=True)
        for heading, value in zip(headings[1:], values, strict=True):
            text = Text(f"  {heading:<{width}}  ") + Text(str(value))
            console.print(text, style=row.style or "", soft_wrap=True)
    console.print()
    if table.caption:
        console.print(table.caption, style=table.caption_style or "", soft_wrap=True)


def _joined_heading(heading: str) -> str:
    """Return a heading of several lines as one."""
    return heading.replace("-\n", "").replace(".\n", ".").replace("\n", " ")


def counted(done: float, total: float | None = None) -> str:
    """Format a count, and the total if it is known.

    Example:
        >>> from anomaly_clip.progress import counted
        >>> counted(1200, 6612), counted(1200)
        ('1,200 of 6,612', '1,200')
    """
    has_total = total is not None and math.isfinite(total)
    return f"{done:,.0f} of {total:,.0f}" if has_total else f"{done:,.0f}"


def rate(speed: float) -> str:
    """Format a speed.

    Example:
        >>> from anomaly_clip.progress import rate
        >>> rate(1234.5), rate(85.34), rate(0.0123)
        ('1,234 per second', '85.3 per second', '0.0123 per second')
    """
    return f"{speed:,.0f} per second" if speed >= 100 else f"{speed:.3g} per second"


def number_of(count: int, noun: str) -> str:
    """Format a count with its noun.

    Example:
        >>> from anomaly_clip.progress import number_of
        >>> number_of(1, "image"), number_of(2, "image")
        ('1 image', '2 images')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> from anomaly_clip.progress import duration
        >>> duration(9.6), duration(77), duration(7500)
        ('10 s', '1 min 17 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
