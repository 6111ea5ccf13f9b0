"""Signals that end a command: exit code 128 + signal, and a sentence on how to continue.

Imports nothing heavy: the libraries may still be loading when a signal arrives.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = [
    "PARENT",
    "Interrupted",
    "advise",
    "defer_signals",
    "end_with_parent",
    "handle_signals",
    "note_signal",
    "received_signal",
    "stop_if_interrupted",
    "take_signals",
]

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
AGAIN = "run the same command again"
PARENT = "ANOMALY_CLIP_PARENT"
"""Variable with the number of the process that started this one, and without which it ends."""
ALONE = 60.0
"""Seconds that a run has to save its last step after the end of that process."""
REPEATED = 2.0
"""Seconds in which a process of several ignores a signal that it has received already.

Schedulers send a signal to all processes, and launchers pass theirs on to the same processes.
"""


class Interrupted(SystemExit):
    """End of a command by a signal.

    Args:
        number: The signal.
        advice: How to continue.
    """

    def __init__(self, number: int, advice: str = AGAIN) -> None:
        super().__init__(128 + number)
        self.number = number
        self.advice = advice

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        by = "" if name == "SIGINT" else f" by {name}"
        return f"interrupted{by}: {self.advice}"


class _Receiver:
    """Handler of the signals of one command."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.received: int | None = None
        self.defers = False
        self.is_one_of_several = False
        self.numbers: set[int] = set()
        """The signals that it handles."""
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data loader worker inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, self.received = self.received is None, self.received or number
        if first:
            self._since = time.monotonic()
        elif self.is_one_of_several and time.monotonic() - self._since < REPEATED:
            return
        if not self.defers:
            raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)
        if first and number != signal.SIGTERM and not self.is_one_of_several:
            os.kill(self.process, signal.SIGTERM)  # Lightning stops after the step
        elif not first and number == self.received:
            self.defers = False
            raise Interrupted(number)


_receivers: list[_Receiver] = []
"""Handlers of the running commands; the last one is in use."""


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise :class:`Interrupted` for SIGTERM and SIGHUP within the ``with`` block.

    Signals that are ignored (``nohup``), or that the calling program handles, stay as they are.
    """
    receiver = _Receiver()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in filter(lambda name: hasattr(signal, name), NAMES):
            number = signal.Signals[name]
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, receiver)
                receiver.numbers.add(number)
    _receivers.append(receiver)
    try:
        yield
    finally:
        _receivers.remove(receiver)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Let this process receive SIGTERM when the one that started it has ended, as by SIGKILL.

    Otherwise it would still write to the folder in which the user resumes the run.
    """
    parent = os.environ.pop(PARENT, None)  # it is not that of further processes
    if parent is None or not hasattr(os, "killpg"):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ALONE)
        os.killpg(os.getpgrp(), signal.SIGKILL)  # this process began a group of its own

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def defer_signals(defers: bool) -> None:
    """Set whether the first signal lets Lightning finish a training step; a second one does not."""
    if _receivers:
        _receivers[-1].defers = defers


def take_signals() -> None:
    """Handle the signals of one of several processes, in place of handlers set since the start.

    Lightning's handler of SIGTERM waits for the other processes, which may not have received it.
    """
    if _receivers and threading.current_thread() is threading.main_thread():
        _receivers[-1].is_one_of_several = True
        for number in _receivers[-1].numbers:
            signal.signal(number, _receivers[-1])


def received_signal() -> int | None:
    """Return the first signal that was received, if any."""
    return _receivers[-1].received if _receivers else None


def note_signal(number: int) -> None:
    """Treat a signal that another process has received as one of this process."""
    if _receivers:
        _receivers[-1].received = _receivers[-1].received or number


def stop_if_interrupted() -> None:
    """Stop now if a signal was deferred.

    Raises:
        Interrupted: If it was.
    """
    if _receivers and (number := _receivers[-1].received) is not None:
        raise Interrupted(number)


@contextmanager
def advise(advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Convert all interruptions in the ``with`` block to :class:`Interrupted` with an advice.

    Args:
        advice: Returns how to continue; called after an interruption. It replaces the advice of the
            block; default: keep that.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        number = _signal_of(error)
        if number is None:  # such as the end of a help text
            raise
        kept = error.advice if isinstance(error, Interrupted) else AGAIN
        raise Interrupted(number, kept if advice is None else advice()) from None


def _signal_of(error: BaseException) -> int | None:
    """Return the signal that led to an exception; None if none did."""
    if isinstance(error, Interrupted):
        return error.number
    if _receivers and (number := _receivers[-1].received) is not None:
        return number
    # Lightning exits after Ctrl-C, and if another process has received SIGTERM.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return signal.SIGINT
    return signal.SIGTERM if type(error).__name__ == "SIGTERMException" else None
