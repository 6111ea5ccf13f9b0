"""The soak in short, and what it must notice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anomaly_clip.testing.processes import can_fork

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not can_fork(), reason="needs processes that are forked")


@pytest.fixture(autouse=True, scope="module")
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Return a function that runs the soak; it returns the exit status, result and output."""

    def call(*words: str) -> tuple[int, dict[str, Any], str]:
        file = tmp_path / "soak.json"
        line = ["soak.py", *words, "--jobs", "1", "--output", str(file)]
        monkeypatch.setattr("sys.argv", line)
        code = import_module("soak").main()
        content = json.loads(file.read_text(encoding="utf-8"))
        (part,) = content["parts"].values()
        return code, {**content, **part}, capsys.readouterr().out

    return call


@pytest.fixture
def common() -> ModuleType:
    return import_module("soak_common")


def test_a_hook_ends_a_process_inside_a_save(common: ModuleType, tmp_path: Path) -> None:
    from anomaly_clip.files import write_bytes

    file = tmp_path / "last.ckpt"

    def save(how: str) -> int:
        hook = common.Hook("*.ckpt", how, size=40, number=2)

        def saves() -> None:
            hook.install()
            for value in b"ab":
                write_bytes(file, bytes([value]) * 100)

        return int(common.run_main(["--version"], prepare=saves).code)

    assert save("half") == -signal.SIGXFSZ
    assert file.read_bytes() == b"a" * 100
    (left,) = tmp_path.glob(".*.ckpt")
    assert left.read_bytes() == b"b" * 40
    left.unlink()
    assert save("rename") == -signal.SIGKILL
    assert file.read_bytes() == b"a" * 100
    assert common.wholes(tmp_path)[0].endswith(".tmp.ckpt: left over")
    assert save("renamed") == -signal.SIGKILL
    assert file.read_bytes() == b"b" * 100


def test_a_hook_fills_the_disk(common: ModuleType, tmp_path: Path) -> None:
    full, other = tmp_path / "full.txt", tmp_path / "other.txt"

    def write(how: str) -> Any:
        def writes() -> None:
            common.Hook("*full.txt", how, size=10).install()
            other.write_text("x" * 20)
            try:
                full.write_text("x" * 20)
            finally:
                other.write_text("y" * 20)

        return common.run_main(["--version"], prepare=writes)

    assert "File too large" in write("full").stderr
    assert (full.read_text(), other.read_text()) == ("x" * 10, "y" * 10)
    assert "File too large" in write("full there").stderr
    assert (full.read_text(), other.read_text()) == ("x" * 10, "y" * 20)


@pytest.mark.parametrize(
    ("code", "stderr", "problem"),
    [
        (2, "start\nanomaly_clip: a/b: no room: free space\n", None),
        (1, "anomaly_clip: a/b: no room\n", "exit code 1"),
        (2, "Traceback (most recent call last):\nanomaly_clip: x\n", "a traceback"),
        (2, "OSError: no room\n", "no sentence"),
    ],
)
def test_an_end_is_one_sentence(
    code: int, stderr: str, problem: str | None, common: ModuleType
) -> None:
    message = common.one_sentence(common.Ended(code, stderr, 0.1))
    assert message is None if problem is None else problem in message


def test_files_that_are_cut_are_found(common: ModuleType, tmp_path: Path) -> None:
    whole = {
        "a.json": "{}",
        "a.csv": "a,b\n1,2\n",
        "a.html": "<html></html>\n",
        "a.yaml": "a: [1]\n",
    }
    for name, text in whole.items():
        (tmp_path / name).write_text(text)
    assert common.wholes(tmp_path) == []
    for name, text in whole.items():
        (tmp_path / name).write_text(text[:-3])
        assert [line.partition(":")[0] for line in common.wholes(tmp_path)] == [name]
        (tmp_path / name).write_text(text)


class Target:
    """A reader that fails in all ways for some inputs."""

    case, how, share = "toy", "toy", 1.0

    def make(self, rng: Any) -> dict[str, bytes]:
        return {"a.txt": b"%d" % rng.randrange(6)}

    def read(self, folder: Path, rng: Any) -> str:
        import os

        number = int((folder / "a.txt").read_text())
        if number == 0:
            raise ValueError("expected another number")
        if number == 1:
            raise KeyError("a")
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3:
            os.write(2, b"a library speaks\n")
        if number == 4:
            raise ValueError
        return "read"


@pytest.mark.slow
def test_the_fuzz_notices_each_kind_of_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fuzz = import_module("soak_fuzz")
    monkeypatch.setattr(fuzz, "TARGETS", (Target(),))
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    (row,) = fuzz.fuzz(40, 5, 2)
    assert row.tried == 40
    assert row.counts["read"] > 0
    assert row.counts["refused"] > 0
    problems = {failure["what"].partition(" (")[0] for failure in row.failures}
    assert problems == {
        "KeyError: 'a'",
        "the process ended with -9",
        "a library wrote to the terminal: a library speaks",
        "ValueError without a message",
    }
    for failure in row.failures:
        saved = (tmp_path / "kept" / failure["file"]).read_text()
        again = Target().make(fuzz._source(Target(), 5, failure["number"]))
        assert saved.encode() == again["a.txt"]  # the seed makes the input again
    assert len(row.failures) + row.counts["read"] + row.counts["refused"] == 40


def test_the_fuzz_ends_an_input_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fuzz = import_module("soak_fuzz")

    class Hanging(Target):
        def read(self, folder: Path, rng: Any) -> str:
            while (folder / "a.txt").read_text() == "0":
                pass
            return "read"

    monkeypatch.setattr(fuzz, "TARGETS", (Hanging(),))
    monkeypatch.setattr(fuzz, "KEPT", tmp_path)
    monkeypatch.setattr(fuzz, "LONGEST", 0.2)
    (row,) = fuzz.fuzz(6, 1, 1)
    assert {failure["what"] for failure in row.failures} == {"no end within 0.2 s"}
    assert len(row.failures) + row.counts["read"] == 6


@pytest.mark.slow
def test_the_short_fuzz_finds_nothing(run: Callable[..., Any]) -> None:
    code, result, out = run("--only", "fuzz", "--count", "300", "--seed", "3")
    assert code == 0, out
    assert sum(row["tried"] for row in result["rows"]) == 300
    assert result["bounds"]["failures"] == {
        "value": 0.0, "bound": 0, "rule": "at most", "met": True,
    }  # fmt: skip
    assert "300 tried, 0 failed" in out


def test_a_part_that_runs_alone_leaves_the_others(tmp_path: Path, common: ModuleType) -> None:
    soak = import_module("soak")
    file = tmp_path / "soak.json"
    kill, full = common.Row("kills", "a", "b", tried=2), common.Row("full", "c", "d", tried=1)
    full.fail("cut", command="fit")
    soak._write(file, [kill], {"kills": 1.0}, 3)
    soak._write(file, [full], {"full": 2.0}, 4)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [(name, part["seed"]) for name, part in content["parts"].items()] == [
        ("kills", 3), ("full", 4),
    ]  # fmt: skip
    assert content["bounds"]["failures"]["met"] is False
    soak._write(file, [common.Row("full", "c", "d", tried=1)], {"full": 2.0}, 5)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["parts"]["kills"]["rows"][0]["tried"] == 2
    assert content["bounds"]["failures"]["met"] is True


@pytest.mark.slow
def test_short_kills_lose_nothing(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kills = import_module("soak_kills")
    monkeypatch.setattr(kills.kills, "__defaults__", (("SimpleNet", "linear probe"),))
    code, result, out = run("--only", "kills", "--count", "2")
    assert code == 0, out
    assert [row["tried"] for row in result["rows"]] == [2, 1]


@pytest.mark.slow
def test_the_kills_notice_a_save_that_is_not_atomic(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.fabric.plugins import TorchCheckpointIO

    from anomaly_clip.recording import checkpoint_io

    kills = import_module("soak_kills")
    monkeypatch.setattr(
        checkpoint_io.AtomicCheckpointIO, "save_checkpoint", TorchCheckpointIO.save_checkpoint
    )
    monkeypatch.setattr(kills, "INSIDE", ("half",))
    monkeypatch.setattr(kills.kills, "__defaults__", (("SimpleNet",),))
    places = kills._places
    monkeypatch.setattr(kills, "_places", lambda disk, memory: places(disk, memory)[1:2] or [])
    if not places(Path("/tmp"), kills.MEMORY)[1:]:
        pytest.skip("one file system")
    code, result, _ = run("--only", "kills", "--count", "4", "--seed", "1")
    assert code == 1
    assert any(row["failures"] for row in result["rows"] if "save" in row["case"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("full", 1), ("processes", 2)])
def test_the_other_parts_in_short(
    name: str, count: int, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("soak_processes"), "TESTED", ("SDP", "linear probe"))
    code, result, out = run("--only", name, "--count", str(count))
    assert code == 0, out
    assert all(row["tried"] for row in result["rows"]), out
