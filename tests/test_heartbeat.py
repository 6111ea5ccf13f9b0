"""Files by which processes tell that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomaly_clip.commands import heartbeat
from anomaly_clip.commands.heartbeat import OLD, SILENCE, Heartbeat, Pulse, State
from anomaly_clip.results.folder import process_start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time that the module sees, which a test may set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def of_another_machine(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "machine": "elsewhere"}))


def test_the_file_lasts_as_long_as_the_process(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "0.json"
    pulse = Pulse(file)
    assert pulse.look() == State.ABSENT
    with Heartbeat(file, plan="a") as beat:
        assert pulse.look() == State.ALIVE
        assert pulse.content["plan"] == "a"
        assert pulse.owner.startswith(f"process {os.getpid()} on ")
        beat.tell(plan="b")
        assert pulse.look() == State.ALIVE
        assert pulse.content["plan"] == "b"
        with pytest.raises(FileExistsError), Heartbeat(file):
            pass
        assert pulse.look() == State.ALIVE
    assert pulse.look() == State.ABSENT
    assert not pulse.content


def test_a_process_may_tell_how_it_ended(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "0.json") as beat:
        beat.end(failed={"a": "why"})
    pulse = Pulse(tmp_path / "0.json")
    assert pulse.look() == State.ENDED
    assert pulse.content["failed"] == {"a": "why"}


def test_a_process_that_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "0.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with Heartbeat(file):
            content = json.loads(file.read_text())
        start = process_start(child.pid)
        file.write_text(json.dumps({**content, "process": child.pid, "start": start}))
        assert Pulse(file).look() == State.ALIVE
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert Pulse(file).look() == State.GONE
    assert Pulse(file).look() == State.GONE
    file.write_text(json.dumps({**content, "start": "another process"}))
    assert Pulse(file).look() == State.GONE


def test_a_file_that_is_being_created(tmp_path: Path) -> None:
    (tmp_path / "0.json").touch()
    assert Pulse(tmp_path / "0.json").look() == State.ABSENT


def test_a_process_on_another_machine(tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "0.json"
    with Heartbeat(file):
        of_another_machine(file)
        pulse = Pulse(file)
        touched = time.time()
        os.utime(file, (touched, touched))
        assert pulse.look() == State.UNCERTAIN
        clock[0] += SILENCE
        assert pulse.look() == State.UNCERTAIN
        os.utime(file, (touched, touched - 30))  # whatever its clock shows
        assert pulse.look() == State.ALIVE
        clock[0] += SILENCE
        assert pulse.look() == State.ALIVE
        clock[0] += 1
        assert pulse.look() == State.GONE
        os.utime(file, (touched, touched))
        assert pulse.look() == State.ALIVE
        os.utime(file, (touched, touched - OLD - 60))
        assert pulse.look() == State.GONE


def test_the_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.001)
    file = tmp_path / "0.json"
    with Heartbeat(file):
        os.utime(file, (0, 0))
        while file.stat().st_mtime == 0:
            pass
    assert not file.exists()
