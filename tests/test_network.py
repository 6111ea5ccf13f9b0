"""No connection at import and in runs whose weights are on this machine.

Python reports its own look-ups and connections to an audit hook, which no import can remove.
Libraries in other languages and other programs, such as that of W&B, do not pass through Python:
strace watches the system calls of all processes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from anomaly_clip.cli import main

ROOT = Path(__file__).resolve().parent.parent
DEMO = ["--data.num_test=2", "--data.categories=[brass washer]", "--trainer.accelerator=cpu"]
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
IMPORT_ALL = """
import importlib, pkgutil, sys
attempts = []
events = sys.argv[1:]
sys.addaudithook(lambda event, where: attempts.append((event, where)) if event in events else None)
import anomaly_clip
names = [m.name for m in pkgutil.walk_packages(anomaly_clip.__path__, "anomaly_clip.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import wandb
from anomaly_clip.data.augment import Augmentation
Augmentation([{"class_path": "HorizontalFlip"}])
print(len(names), "albumentations" in sys.modules, attempts)
"""

_attempts: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in LOOKUPS + CONNECTIONS:
        return
    where = arguments[1] if event in CONNECTIONS else arguments[0]
    if event in CONNECTIONS and not isinstance(where, tuple):
        return  # a socket of this machine's file system, or one that is connected already
    _attempts.append(f"{event} {where}")
    raise OSError(f"the tests allow no network: {event} {where}")


@pytest.fixture(scope="session")
def _installed() -> None:
    sys.addaudithook(_hook)  # stays until Python ends, and does nothing outside these tests


@pytest.fixture
def attempts(_installed: None) -> Iterator[list[str]]:
    """Refuse all look-ups and connections of this process, and collect them."""
    global _watching
    _attempts.clear()
    _watching = True
    yield _attempts
    _watching = False


@pytest.mark.parametrize(
    "call",
    [
        lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.01),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 9)),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_attempt_is_noticed(attempts: list[str], call: Callable[[], object]) -> None:
    with suppress(OSError):
        call()
    assert len(attempts) >= 1


def test_the_demo_opens_no_connection(attempts: list[str], tmp_path: Path) -> None:
    assert main(["test", "--config=demo", *DEMO, f"--output.root={tmp_path}"]) == 0
    assert attempts == []


@pytest.mark.slow
def test_the_other_verbs_open_no_connection(
    attempts: list[str], tmp_path: Path, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = f"--output.root={tmp_path / 'runs'}"
    images = f"--data.root={mvtec_root / 'bottle' / 'train' / 'good'}"
    network = ["--model.backbone.name=resnet18", "--model.backbone.weights=random"]
    padim = ["--config=padim", *network, "--model.num_channels=8", "--model.image_size=64"]
    padim += [
        f"--data.root={mvtec_root}",
        "--data.categories=[bottle]",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
    ]
    clip = ["--model.backbone.name=demo", "--model.backbone.pretrained=demo", "--model.stages=null"]
    commands = [
        ["configs"],
        ["configs", "sdp"],
        ["preview", "--data=Demo", "--file=preview.png"],
        ["fit", *padim, root],
        ["test", *padim, root, "--ckpt_path=last"],
        ["each", *padim, root],
        ["predict", "--config=own_images", *clip, images, "--data.category=toy", root],
        ["report", "runs/padim/2"],
        ["report", "runs/padim/2", "--page"],
    ]
    for command in commands:
        assert main(command) == 0, command
        assert attempts == [], command
    main(["check", "--data=MVTecAD", f"--data.root={mvtec_root}"])  # 1: images are missing
    assert attempts == []


def test_weights_that_are_absent_are_not_looked_up_offline(
    attempts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests run with HF_HUB_OFFLINE=1, as a user may who has no network."""
    images = f"--data.root={ROOT / '.github' / 'images'}"
    options = ["--config=own_images", images, "--data.category=toy", f"--output.root={tmp_path}"]
    assert main(["predict", *options, "--model.backbone.pretrained=laion400m_e31"]) == 2
    assert "offline mode is set" in capsys.readouterr().err
    assert attempts == []


def traced(words: list[str], folder: Path, **variables: str) -> tuple[str, list[str]]:
    """Run Python under strace; return its output and the connections of all its processes.

    A connection within this machine does not count, unless it asks for a name (port 53).
    """
    if shutil.which("strace") is None:
        pytest.skip("needs strace, which watches other programs")
    log = folder / "trace.txt"
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    result = subprocess.run(
        ["strace", "-f", "-qq", "-e", calls, "-o", str(log), sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )
    if "ptrace" in result.stderr and not log.read_text():
        pytest.skip("strace is not allowed here")
    assert result.returncode == 0, result.stderr
    return result.stdout, remote(log.read_text())


def remote(trace: str) -> list[str]:
    """Return the system calls of a trace that leave this machine."""
    internet = [line for line in trace.splitlines() if re.search(r"sa_family=AF_INET6?\b", line)]
    local = re.compile(r'inet_addr\("127\.|inet_pton\(AF_INET6, "::1"')
    return [line for line in internet if not local.search(line) or "htons(53)" in line]


def test_calls_that_leave_this_machine_are_recognised() -> None:
    call = '12 connect(3, {sa_family=AF_INET, sin_port=htons(%d), sin_addr=inet_addr("%s")}, 16)'
    v6 = '12 connect(3, {sa_family=AF_INET6, sin6_port=htons(443), inet_pton(AF_INET6, "%s"'
    inside = [
        call % (8080, "127.0.0.1"),
        v6 % "::1",
        '1 connect(3, {sa_family=AF_UNIX, sun_path="/a"',
    ]
    outside = [call % (443, "192.0.2.1"), call % (53, "127.0.0.53"), v6 % "2001:db8::1"]
    assert remote("\n".join(inside + outside)) == outside


@pytest.mark.slow
def test_strace_sees_an_attempt(tmp_path: Path) -> None:
    code = (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    )
    _, calls = traced(["-c", code], tmp_path)
    assert len(calls) == 1


@pytest.mark.slow
def test_no_module_opens_a_connection_on_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Import everything, and albumentations, which otherwise looks for a newer version."""
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE", raising=False)  # an earlier test may have set it
    monkeypatch.delenv("HF_HUB_OFFLINE")
    words = ["-W", "ignore", "-c", IMPORT_ALL, *LOOKUPS, *CONNECTIONS]
    output, calls = traced(words, tmp_path)
    count, albumentations, attempts = output.strip().split("\n")[-1].split(" ", 2)
    assert int(count) > 150
    assert albumentations == "True"
    assert attempts == "[]"
    assert calls == []


@pytest.mark.slow
def test_the_program_of_wandb_opens_no_connection_offline(tmp_path: Path) -> None:
    options = ["--config=demo", *DEMO, "--trainer.logger=WandbLogger", f"--output.root={tmp_path}"]
    _, calls = traced(["-m", "anomaly_clip", "test", *options], tmp_path, WANDB_MODE="offline")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert calls == []
