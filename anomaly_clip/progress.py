"""Progress of long steps: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
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

__all__ = [
    "Clock",
    "LogProgress",
    "counted",
    "duration",
    "rate",
    "say",
    "sees_bars",
    "show_below",
    "silence",
    "track",
    "wide_console",
]

Item = TypeVar("Item")
Clock = Callable[[], float]
"""Returns seconds since some moment, as :func:`time.monotonic`."""

FIRST_LINE = 10.0
"""Seconds before the first line of a step; most steps are done by then."""
LINE_INTERVAL = 30.0
"""Least seconds from one line to the next."""
LINE_SHARE = 0.1
"""Least time from one line to the next, as a share of the time so far."""
BAR_INTERVAL = 0.1
"""Least seconds from one refresh of a bar to the next."""
MAX_WIDTH = 10_000
"""Characters of a line that is not cut, in a file."""

_silent = False
_displays: list[Progress] = []
"""The display on the screen, if ``track`` began one: a second one would write over it."""
_find_display: Callable[[], Progress | None] | None = None
"""Returns the display of another library, as Lightning's."""


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, once it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate(speed), style="progress.data.speed")


class LogProgress:
    """Log-style progress of a long step, for non-interactive output.

    The first line comes after ten seconds; then they become rarer, as the step becomes longer.

    Args:
        title: Name of the step.
        clock: Returns the time.
    """

    def __init__(self, title: str, clock: Clock = time.monotonic) -> None:
        self.title = title
        self._clock = clock
        self._begun = clock()
        self._next = self._begun + FIRST_LINE

    @property
    def due(self) -> bool:
        """True when it is time for a line; cheap enough to ask at every item."""
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
            done: Items done since the step began.
            total: Number of items; None or infinity if it is unknown.
            where: Position in words; default: the numbers.
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
        """Write the last line, with the time taken, if that was long enough for lines."""
        passed = self._clock() - self._begun
        if passed >= FIRST_LINE:
            say(f"{self.title}: {done} in {duration(passed)}")


def silence(silent: bool) -> None:
    """Show nothing of long steps from now on, or show them again; lines of `say` stay."""
    global _silent
    _silent = silent


def track(
    items: Iterable[Item],
    title: str,
    total: int | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Item]:
    """Yield the items and show the progress, on the first process only.

    Args:
        items: Any items.
        title: Name of the step.
        total: Number of items, where they have no length.
        clock: Returns the time.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _silent or getattr(rank_zero_only, "rank", 0) != 0 or total == 0:
        yield from items
    elif sees_bars():
        yield from _with_bar(items, title, total, clock)
    else:
        yield from _with_lines(items, title, total, clock)


def _with_bar(items: Iterable[Item], title: str, total: int | None, clock: Clock) -> Iterator[Item]:
    with _display() as progress:
        unknown = None if progress in _displays else math.inf  # as Lightning's display says it
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
    """Let bars appear in another library's display whenever it is on the screen.

    Args:
        find: Returns the display, None while it is not shown.
    """
    global _find_display
    _find_display = find


def sees_bars() -> bool:
    """Return whether bars can move on standard error: a terminal, or a notebook."""
    console = Console(stderr=True)
    return console.is_interactive or console.is_jupyter


@rank_zero_only
def say(text: str, style: str | None = None) -> None:
    """Write a line for people, on the first process only; standard output is for results."""
    running = _running_display()
    console = Console(stderr=True) if running is None else running.console
    # Names of files and categories may hold brackets and colons.
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False, emoji=False)


def wide_console(table: Table) -> Console:
    """Return a console for standard output in which a table is not cut, if that is a file."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a file's lines are as long as they must be
        needed = console.measure(table, options=console.options.update(max_width=MAX_WIDTH))
        console.width = max(console.width, needed.maximum)
    return console


def counted(done: float, total: float | None = None) -> str:
    """Return a count in words, of a total if that is known.

    Example:
        >>> from anomaly_clip.progress import counted
        >>> counted(1200, 6612), counted(1200)
        ('1,200 of 6,612', '1,200')
    """
    has_total = total is not None and math.isfinite(total)
    return f"{done:,.0f} of {total:,.0f}" if has_total else f"{done:,.0f}"


def rate(speed: float) -> str:
    """Return a speed in words.

    Example:
        >>> from anomaly_clip.progress import rate
        >>> rate(1234.5), rate(85.34), rate(0.0123)
        ('1,234 a second', '85.3 a second', '0.0123 a second')
    """
    return f"{speed:,.0f} a second" if speed >= 100 else f"{speed:.3g} a second"


def duration(seconds: float) -> str:
    """Return a time in words.

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
