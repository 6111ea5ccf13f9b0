"""A clock for tests of progress."""

from __future__ import annotations


class StandingClock:
    """A clock that somebody else sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
