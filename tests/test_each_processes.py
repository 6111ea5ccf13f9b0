"""``each`` in several processes: files by which they agree, and the results of one process."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.commands import each_processes, heartbeat
from anomaly_clip.commands.each import run_each
from anomaly_clip.commands.each_processes import (
    FIRST_SIGN,
    Plan,
    announced,
    announcement,
    announcement_file,
    only_run,
    process_file,
    wait_for_others,
)
from anomaly_clip.commands.heartbeat import SILENCE, Heartbeat, Pulse, State
from anomaly_clip.commands.launch import Launch
from anomaly_clip.errors import UserError

CATEGORIES = ["bottle", "cable", "metal_nut"]


def task(rank: int, size: int = 2, is_unique: bool = True) -> Launch:
    return Launch("srun" if is_unique else "torchrun", rank, size, rank, size, "7", is_unique)


def plan(folder: Path) -> Plan:
    return Plan(str(folder), str(folder.parent), ["a", "\udcff"], False, True, True, "data")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock of both modules; return its time, which a sleep advances by 10 seconds."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += 10

    stand_in = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, time=time.time)
    monkeypatch.setattr(each_processes, "time", stand_in)
    monkeypatch.setattr(heartbeat, "time", stand_in)
    return now


def write_process(file: Path, **content: object) -> None:
    """Write the file of a process that has been killed, unless the content differs."""
    owner = {"machine": platform.node(), "process": os.getpid(), "start": "earlier"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**owner, **content}))


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["each", "--config", "padim"], "runs"),
        (["each", "--output.root", "there"], "there"),
        (["each", "--output.root=there", "--output.folder=here/mine"], "here"),
        (["each", "--resume", "runs/padim/3"], "runs/padim"),
        (["each", "--resume=mine"], "."),
    ],
)
def test_all_processes_look_at_the_same_place(words: list[str], place: str) -> None:
    file = announcement_file(words, task(1))
    assert file == announcement_file(words, task(0))
    assert file.parent == Path(place)
    another = Launch("srun", 1, 2, 1, 2, "8", True)
    assert announcement_file(words, another) != file


def test_the_first_process_announces_the_run(tmp_path: Path) -> None:
    words = ["each", "--output.root", str(tmp_path)]
    old, recent, file = (tmp_path / f".each-{name}.json" for name in ("old", "recent", "file"))
    for leftover in (old, recent):
        leftover.touch()
    os.utime(old, (0, 0))
    file = announcement_file(words, task(0))
    write_process(file, plan="of an earlier command")
    with announcement(words, task(0)) as announce:
        assert not old.exists()
        assert recent.exists()
        assert "plan" not in json.loads(file.read_text())
        announce(plan(tmp_path))
        assert announced(words, task(1)) == plan(tmp_path)
    assert not file.exists()


def test_a_single_process_announces_nothing(tmp_path: Path) -> None:
    with announcement(["each", "--output.root", str(tmp_path)], None) as announce:
        announce(plan(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_unique", [True, False])
def test_a_mistake_before_the_announcement(
    tmp_path: Path, clock: list[float], is_unique: bool
) -> None:
    """torchrun ends the other processes, and its next command may have the same name."""
    words = ["each", "--output.root", str(tmp_path)]
    place = task(0, is_unique=is_unique)
    with pytest.raises(UserError, match="a mistake"), announcement(words, place):
        raise UserError("a mistake")
    assert announcement_file(words, place).exists() == is_unique
    if is_unique:
        assert announced(words, place) is None


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    words = ["--output.folder", str(tmp_path / "new" / "runs" / "one")]
    with pytest.raises(UserError, match="a mistake"), announcement(words, task(0, 2, False)):
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []


def test_an_announcement_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--output.folder", str(tmp_path / "file" / "one")]
    with (
        pytest.raises(UserError, match=r"file.*: cannot be created .*: choose another --output"),
        announcement(words, task(0)),
    ):
        pass


def test_a_failure_after_the_announcement_leaves_no_file(tmp_path: Path) -> None:
    words = ["each", "--output.root", str(tmp_path)]

    def fail() -> None:
        with announcement(words, task(0)) as announce:
            announce(plan(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_first_process_that_does_not_begin(tmp_path: Path, clock: list[float]) -> None:
    words, begun = ["each", "--output.root", str(tmp_path)], clock[0]
    write_process(announcement_file(words, task(1)), plan="of an earlier command")
    with pytest.raises(UserError, match="process 0 of 2 has not begun, or has ended, as "):
        announced(words, task(1))
    assert FIRST_SIGN < clock[0] - begun <= FIRST_SIGN + 10


@pytest.mark.parametrize(
    ("last", "message"), [(State.GONE, "as after SIGKILL"), (State.ABSENT, None)]
)
def test_a_first_process_that_ends_while_it_prepares(
    tmp_path: Path,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    last: State,
    message: str | None,
) -> None:
    states = iter([State.ABSENT, State.UNCERTAIN, *100 * [State.ALIVE], last])
    monkeypatch.setattr(Pulse, "look", lambda self: next(states))
    words = ["each", "--output.root", str(tmp_path)]
    if message is None:
        assert announced(words, task(1)) is None
        return
    with pytest.raises(UserError, match=message):
        announced(words, task(1))


def begin(folder: Path, owner: str) -> None:
    """Begin a second command in a folder, which is refused."""
    expected = f"{folder}: {owner} runs the categories of this folder now: wait until it ends"
    with pytest.raises(UserError, match=re.escape(expected)), only_run(folder):
        pass


def test_a_folder_belongs_to_one_command(tmp_path: Path) -> None:
    write_process(process_file(tmp_path, 0))
    write_process(process_file(tmp_path, 1), ended=True)
    with only_run(tmp_path):
        assert [file.name for file in (tmp_path / ".processes").iterdir()] == ["0.json"]
        begin(tmp_path, f"process {os.getpid()} on {platform.node()}")
        write_process(process_file(tmp_path, 1), ended=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="of the run"), only_run(tmp_path):
        raise FileExistsError("of the run")
    assert not list(tmp_path.iterdir())
    with Heartbeat(process_file(tmp_path, 1)):
        begin(tmp_path, f"process {os.getpid()} on {platform.node()}")
        assert process_file(tmp_path, 1).exists()


def test_a_command_that_begins_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process_file(tmp_path, 0).parent.mkdir()
    process_file(tmp_path, 0).touch()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    begin(tmp_path, "another command")


def test_a_command_on_another_machine_may_have_been_killed(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    begun = clock[0]
    write_process(process_file(tmp_path, 0), machine="elsewhere")
    with only_run(tmp_path):
        assert SILENCE < clock[0] - begun <= SILENCE + 20
    assert "finding out for up to 150 s if process" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run in which process 0 has finished its categories a and d."""
    for name in ("a", "d"):
        (tmp_path / name).touch()
    return tmp_path


def wait(run: Path, size: int = 3) -> dict[str, str]:
    return wait_for_others(run, task(0, size), list("abcdef"), lambda name: (run / name).exists())


def test_the_results_of_other_processes(run: Path, clock: list[float]) -> None:
    begun = clock[0]
    (run / "b").touch()
    write_process(process_file(run, 1), ended=True, failed=json.dumps({"e": "no images"}))
    write_process(process_file(run, 2), ended=True)
    interrupted = "process 2 of 3 was interrupted"
    assert wait(run) == {"e": "no images", "c": interrupted, "f": interrupted}
    assert clock[0] == begun


def test_other_processes_that_were_killed_or_never_begun(
    run: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    begun = clock[0]
    (run / "c").touch()
    write_process(process_file(run, 1))
    failed = wait(run)
    assert set(failed) == {"b", "e", "f"}
    assert failed["b"].startswith("process 1 of 3 has ended without a message, as after SIGKILL")
    assert failed["f"] == "process 2 of 3 has not begun"
    assert SILENCE < clock[0] - begun <= SILENCE + 10
    assert capsys.readouterr().err == "waiting for the other processes: f\n"


def test_a_process_that_is_late(
    run: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins, works longer than the silence, and finishes."""
    states = iter([State.ABSENT, *100 * [State.ALIVE], *100 * [State.UNCERTAIN], State.ENDED])

    def look(self: Pulse) -> State:
        state = next(states)
        if state == State.ENDED:
            for name in "bcef":
                (run / name).touch()
        return state

    monkeypatch.setattr(Pulse, "look", look)
    assert wait(run, 2) == {}
    assert next(states, None) is None


def test_a_process_without_categories_and_without_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"NTASKS": "3", "PROCID": "2", "LOCALID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", text)
    prepared = Plan(str(tmp_path), str(Path.cwd()), ["a", "b"], False, True, True, "data")
    monkeypatch.setattr("anomaly_clip.commands.each.announced", lambda *rest: prepared)
    with Heartbeat(process_file(tmp_path, 0)):
        assert run_each(["each"]) == 0
        assert capsys.readouterr().err == ""
        assert Pulse(process_file(tmp_path, 2)).look() == State.ENDED
        process_file(tmp_path, 2).unlink()
        write_process(process_file(tmp_path, 0))
        assert run_each(["each"]) == 1
    resume = f"continue with anomaly_clip each --resume {tmp_path}\n"
    err = capsys.readouterr().err
    assert err == f"process 0 of 3 has ended and joins no results: {resume}"


# -- real processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three categories in MVTec-AD's layout."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "mvtec"
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 8:30] = 255
    for category in CATEGORIES:
        folder = root / category
        save_picture(folder / "ground_truth" / "cut" / "0_mask.png", mask)
        for name in ("train/good/0", "train/good/1", "test/good/0", "test/good/1", "test/cut/0"):
            image = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            save_picture(folder / f"{name}.png", image)
    return root


def words(root: Path, *more: str) -> list[str]:
    line = ["each", "--model", "PaDiM", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "32", "--model.num_channels", "8", "--output.name", "padim"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    return [*line, "--trainer.accelerator", "cpu", *more]


def environment(**variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def srun(step: int, size: int, line: list[str], folder: Path) -> list[tuple[int, str]]:
    """Run the command as srun does; return exit code and standard error of each process."""
    children = []
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": str(step), "SLURM_NTASKS": str(size)}
    for rank in range(size):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "anomaly_clip", *line],
                cwd=folder,
                env=environment(**job, **place),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [child.communicate(timeout=500)[1] for child in children]
        return [(child.returncode, text) for child, text in zip(children, errors, strict=True)]
    finally:
        for child in children:
            child.kill()


@pytest.fixture(scope="module")
def single(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run all categories in one process; return the run's folder."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = [sys.executable, "-m", "anomaly_clip", *words(root)]
        subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=500)
        yield folder / "runs" / "padim" / "1-each"


def results(run: Path) -> dict[str, bytes]:
    """Return the files of a run, checkpoints and images included, by relative path."""
    files = (file for file in run.rglob("*") if file.is_file() and file.name != "each.json")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_two_processes_of_torchrun_write_the_files_of_one(
    root: Path, single: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", "-m", "anomaly_clip", *words(root)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    together = results(tmp_path / "runs" / "padim" / "1-each")
    assert together == results(single)
    assert len(together) > 30
    assert not list((tmp_path / "runs").glob(".*"))
    assert "each PaDiM | 3 categories | 2 processes of torchrun | run runs/padim/1" in done.stderr
    assert done.stderr.count("fit PaDiM | ") == 2  # process 1 prints names only
    assert all(f"[{n}/3] {name}" in done.stderr for n, name in enumerate(CATEGORIES, start=1))
    assert done.stdout.count("PaDiM on MVTecAD") == 1


@pytest.mark.slow
def test_a_process_that_is_killed_and_the_run_resumed_by_more(
    root: Path, single: Path, tmp_path: Path
) -> None:
    killed = ["--trainer.callbacks+=killed_fit.Killed", "--trainer.callbacks.category=cable"]
    killed += ["--trainer.callbacks.marker=killed"]
    first, second = srun(0, 2, words(root, *killed), tmp_path)
    assert second == (-9, "[2/3] cable\n")
    assert first[0] == 1
    last = first[1].splitlines()
    run = Path("runs", "padim", "1-each")
    assert last[-3].startswith("failed: cable: process 1 of 2 has ended without a message, as")
    assert last[-1] == f"missing: cable; continue with anomaly_clip each --resume {run}"
    content = json.loads((tmp_path / run / "metrics.json").read_text())
    assert list(content["categories"]) == ["bottle", "metal_nut"]
    assert list(content["run"]["failed"]) == ["cable"]
    assert not content["run"]["protocol"]["complete"]

    done = srun(1, 4, ["each", "--resume", str(run)], tmp_path)
    assert [code for code, _ in done] == [0, 0, 0, 0]
    assert [text for _, text in done[1:]] == ["[2/3] cable\n", "[3/3] metal_nut\n", ""]
    assert done[0][1].count("already finished") == 1
    names = ("metrics", "scores", "last.ckpt", "curves")
    for name, content in results(single).items():
        if any(part in name for part in names):
            assert (tmp_path / run / name).read_bytes() == content
    assert not list((tmp_path / "runs").glob(".*"))
    assert not (tmp_path / run / ".processes").exists()


@pytest.mark.slow
def test_mistakes_are_reported_by_the_first_process(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("NTASKS", "2"), ("PROCID", "0"), ("LOCALID", "0"), ("JOB_ID", "7")):
        monkeypatch.setenv(f"SLURM_{name}", text)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for option in ("--trainer.devices=2", "--trainer.num_nodes=2"):
        assert main(words(root, option)) == 2
        assert f"{option[2:].replace('=', ' ')}: torchrun or srun has" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert main(words(root)) == 0
    assert main(words(root, "--dry-run")) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(words(root, "--dry-run")) == 0
    assert capsys.readouterr().out.count("anomaly_clip fit --model PaDiM") == 3
