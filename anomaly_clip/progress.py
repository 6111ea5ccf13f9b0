"""Progress of the long steps that Lightning's own bars do not cover."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import track as rich_track

__all__ = ["track"]

Item = TypeVar("Item")


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
    yield from rich_track(
        items, title, total, console=console, transient=True, disable=not shown, show_speed=True
    )
