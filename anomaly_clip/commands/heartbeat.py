"""Files by which processes on several machines tell that they still run.

A process touches its file every few seconds. On its machine, others look for the process itself; on
other machines, they compare two times of the file with each other, because clocks differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from anomaly_clip.files import write_json
from anomaly_clip.results.folder import has_ended, process_start

__all__ = ["SILENCE", "Heartbeat", "Pulse", "State"]

INTERVAL = 5.0
"""Seconds between two touches of a file."""
SILENCE = 150.0
"""Seconds without a touch after which a process on another machine has ended.

File systems of clusters show the time of a file up to a minute late.
"""


OLD = 3600.0
"""Seconds since the last touch, by this machine's clock, after which no further look is needed."""


class State(Enum):
    """State of a process, as its file tells."""

    ABSENT = "absent"
    """There is no file."""
    UNCERTAIN = "uncertain"
    """It runs on another machine, and its file has not been touched while this process looked."""
    ALIVE = "alive"
    ENDED = "ended"
    """It has told so."""
    GONE = "gone"
    """It has ended without telling, as after SIGKILL."""


class Heartbeat:
    """File of this process, touched until the end of the ``with`` block, which removes it.

    Args:
        file: The file.
        content: Content for other processes.

    Raises:
        FileExistsError: In ``__enter__``, if there is such a file.
    """

    def __init__(self, file: Path, **content: Any) -> None:
        self.file = Path(os.path.abspath(file))  # the working directory may change
        number = os.getpid()
        owner = {"machine": platform.node(), "process": number, "start": process_start(number)}
        self._content = {**owner, **content}
        self._is_kept = False
        self._stopped = threading.Event()

    def __enter__(self) -> Heartbeat:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("x"):  # of two processes, only one succeeds
            pass
        self.tell()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if not self._is_kept:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)

    def tell(self, **content: Any) -> None:
        """Add to the content."""
        self._content |= content
        write_json(self.file, self._content)

    def end(self, **content: Any) -> None:
        """Tell that this process ends, and keep the file for others."""
        self._stopped.set()
        self._is_kept = True
        self.tell(ended=True, **content)

    def _beat(self) -> None:
        while not self._stopped.wait(INTERVAL):
            with contextlib.suppress(OSError):  # the file system does not answer at the moment
                os.utime(self.file)


class Pulse:
    """The file of another process, which this one observes.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {}
        """Content of the file at the last look; empty without one."""
        self._touched: int | None = None
        self._is_moving = False
        self._since = 0.0

    def look(self) -> State:
        """Return the present state of the process."""
        try:
            touched = self.file.stat().st_mtime_ns
            self.content = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or one that is being created
            self.content = {}
            return State.ABSENT
        if self.content.get("ended"):
            return State.ENDED
        owner = tuple(self.content[name] for name in ("machine", "process", "start"))
        if owner[0] == platform.node() and os.name != "nt":
            return State.GONE if has_ended(*owner) else State.ALIVE
        if time.time() - touched / 1e9 > OLD:
            return State.GONE
        if touched != self._touched:
            self._is_moving = self._touched is not None
            self._touched, self._since = touched, time.monotonic()
        elif time.monotonic() - self._since > SILENCE:
            return State.GONE
        return State.ALIVE if self._is_moving else State.UNCERTAIN

    @property
    def owner(self) -> str:
        """The process and its machine, for messages."""
        return f"process {self.content.get('process')} on {self.content.get('machine')}"
