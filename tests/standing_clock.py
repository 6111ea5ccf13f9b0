"""A clock for tests of progress."""

from __future__ import annotations


class StandingClock:
    """A clock that only moves when a test sets ``now``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
