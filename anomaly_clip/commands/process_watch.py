"""Processes of a run: messages between them, and a watch over those that Lightning has started."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from anomaly_clip.commands.process_cause import Cause, ProcessFailure, killed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["PATIENCE", "Board", "Watch", "connected"]

PATIENCE = 10.0
"""Seconds that process 0 has to notice that another one has failed, and waits for the others."""
FIRST, LEFT = "first", "left"
"""Keys of the store: cause of the first process that has failed, number of processes that end."""


def connected() -> bool:
    """Return whether this process communicates with others."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Board:
    """Messages between the processes, in the store that process 0 or the launcher keeps.

    Unlike a collective, it does not wait for a process that has ended.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        self.store: Any = dist.PrefixStore("anomaly_clip", store)  # type: ignore[attr-defined]

    def claim(self, cause: Cause | None) -> Cause | None:
        """Leave a cause unless there is one already; return the one that is there.

        Raises:
            RuntimeError: If the store cannot be reached, because its process has ended.
        """
        if cause is not None:
            self.store.compare_set(FIRST, "", json.dumps(asdict(cause)))
        if not self.store.check([FIRST]):
            return None
        return Cause(**json.loads(self.store.get(FIRST)))

    def leave(self) -> None:
        """Count this process among those that end."""
        self.store.add(LEFT, 1)

    @property
    def num_left(self) -> int:
        """Number of processes that end."""
        return int(self.store.add(LEFT, 0))


class Watch(threading.Thread):
    """Watch the processes that Lightning has started, in place of Lightning's own observer.

    That one kills process 0 within five seconds after another process has failed: with a gap in
    which nothing is cleaned up, and no cause is reported.
    """

    def __init__(self, trainer: Trainer, clean_up: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="process-watch")
        self.trainer = trainer
        self.clean_up = clean_up
        self.processes: list[subprocess.Popen[bytes]] = []
        self._done = threading.Event()

    def start(self) -> None:
        """Start the thread if Lightning starts the other processes."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

        launcher = self.trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return
        if isinstance(launcher.cluster_environment, LightningEnvironment) and (
            not launcher.cluster_environment.creates_processes_externally
        ):
            self._launcher = launcher
            super().start()

    def finish(self) -> None:
        """Stop watching: the run is done, or its failure has been noticed."""
        self._done.set()

    def run(self) -> None:
        """Wait until a process fails, then for process 0 to notice; end it if it does not."""
        while len(self._launcher.procs) < self._launcher.num_processes - 1:
            if self._done.wait(0.1):
                return
        self.processes = list(self._launcher.procs)
        if self._done.wait(1):  # Lightning's observer begins in this time, with the list of before
            return
        theirs, self._launcher.procs = self._launcher.procs, list(self.processes)
        theirs.clear()  # it stops when it has nothing to observe
        while not self._done.wait(0.2):
            failed = [(n, p) for n, p in enumerate(self.processes, 1) if p.poll()]
            if failed and not self._done.wait(PATIENCE):
                self._end_stuck(*failed[0])

    def _end_stuck(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """End process 0, which waits for one that has failed, and will not notice."""
        causes: list[Cause] = []

        def read() -> None:
            if connected() and (cause := Board().claim(None)) is not None:
                causes.append(cause)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(2)  # the store may be in use by the process that is stuck
        self.end_others()
        self.clean_up()
        code = process.returncode
        cause = causes[0] if causes else killed(rank, code) if code < 0 else None
        code = 128 - code if code < 0 else code
        os._exit(ProcessFailure(code, cause, len(self.processes) + 1).report())

    def end_others(self) -> None:
        """Kill the processes that have not ended by themselves."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def killed(self) -> Cause | None:
        """Return the cause of the first process that a signal has ended, if any."""
        codes = [(rank, process.poll()) for rank, process in enumerate(self.processes, 1)]
        return next((killed(rank, code) for rank, code in codes if code and code < 0), None)
