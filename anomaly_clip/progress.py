"""Progress of the long steps that Lightning's own bars do not cover."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["say", "track"]

Item = TypeVar("Item")


class Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Return the rate, once it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} a second", style="progress.data.speed")


def track(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items behind a progress bar on a terminal, on the first process only.

    Args:
        items: What is worked through.
        title: What is done.
        total: How many there are, where that cannot be told beforehand.
    """
    items = items if isinstance(items, Sequence) or total is not None else list(items)
    console = Console(stderr=True)
    first = getattr(rank_zero_only, "rank", 0) == 0
    shown = first and console.is_terminal
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield from progress.track(items, total, description=title)


@rank_zero_only
def say(text: str, style: str | None = None) -> None:
    """Write a line for people, on the first process only; standard output is for results."""
    # No markup: names of files and categories may hold brackets.
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    console.print(text, style=style)
