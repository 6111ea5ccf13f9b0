"""Running several experiments one after the other."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomaly_clip.commands import batch
from anomaly_clip.commands.batch import (
    DryRunCLI,
    forbid_distributed_launch,
    pop_resume,
    run_in_turn,
)
from anomaly_clip.commands.interruption import PARENT, Interrupted
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.errors import UserError
from anomaly_clip.progress import say


@pytest.mark.parametrize("form", ["--resume RUN", "--resume=RUN"])
def test_resume_is_removed_from_the_arguments(form: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").touch()
    option = form.replace("RUN", str(tmp_path)).split()
    words = ["sweep", "a", *option, "--b", "c"]
    assert pop_resume(words, "sweep.json") == (["a", "--b", "c"], tmp_path)
    assert pop_resume(["sweep", "a"], "sweep.json") == (["a"], None)
    with pytest.raises(UserError, match=r"--resume .*: expected a run folder of sweep"):
        pop_resume(words, "other.json")
    with pytest.raises(UserError, match="--resume : expected a run folder"):
        pop_resume(["sweep", "--resume"], "sweep.json")


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun"),
    ],
)
def test_launchers_of_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(name, "1" if text == "2" else text)
    forbid_distributed_launch("sweep")
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError) as caught:
        forbid_distributed_launch("sweep")
    expected = f"but {launcher} has started 2 copies of the command ({next(iter(variables))})"
    assert expected in str(caught.value)


def test_one_failure_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def fail() -> None:
        raise ValueError("a reason\nand more")

    def refuse() -> None:
        raise UserError("no images")

    jobs = {"a": fail, "b": lambda: done.append("b"), "c": refuse, "d": lambda: done.append("d")}
    assert run_in_turn(jobs, "resume") == {"a": "a reason", "c": "no images"}
    assert done == ["b", "d"]
    assert "[4/4] d" in capsys.readouterr().err
    assert run_in_turn(jobs, "resume", UserError) == {"a": "a reason", "c": "no images"}
    assert done == ["b", "d", "b"]  # no job after the UserError of c


def test_a_share_of_the_jobs_keeps_the_numbers_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        say("details")
        raise ValueError("a reason")

    jobs = {"b": lambda: say("details"), "d": fail}
    assert run_in_turn(jobs, "resume", among="abcd", quiet=True) == {"d": "a reason"}
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[2/4] b", "[4/4] d", "d failed: a reason"]
    assert run_in_turn(jobs, "resume", among="abcd") == {"d": "a reason"}
    assert capsys.readouterr().err.count("details") == 2


def test_an_interruption_names_the_command_that_resumes() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run_in_turn({"a": interrupted}, "anomaly_clip each --resume runs/1")
    assert str(caught.value) == "interrupted: resume with anomaly_clip each --resume runs/1"


def test_the_last_message_of_a_subprocess_is_the_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; print('table'); sys.stderr.write('a line\\nanomaly_clip: no images\\n')"
    with pytest.raises(UserError, match=r"^no images$"):
        batch._run_apart([sys.executable, "-c", f"{code}; sys.exit(2)"])
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a line\n")
    batch._run_apart([sys.executable, "-c", code])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always searches it")
def test_a_file_of_the_working_folder_does_not_replace_a_library_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(2)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert batch._run_apart([sys.executable, "-c", "import json"]) == 0
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as in this process
    with pytest.raises(UserError):
        batch._run_apart([sys.executable, "-c", "import json"])


def test_a_run_ends_with_the_command_that_started_it(tmp_path: Path) -> None:
    """SIGKILL cannot be passed on, so the processes of the run find out themselves."""
    code = f"import os, sys; sys.exit(2 * (os.environ['{PARENT}'] != str(os.getppid())))"
    batch._run_apart([sys.executable, "-c", code])
    child = (
        "import os, pathlib, time\n"
        "from anomaly_clip.commands.interruption import end_with_parent, handle_signals\n"
        "with handle_signals():\n"
        "    end_with_parent()\n"
        f"    pathlib.Path('started').write_text(str('{PARENT}' in os.environ))\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except SystemExit as error:\n"
        "        pathlib.Path('ended').write_text(str(error.code))\n"
    )
    script = f'{PARENT}=$$ {sys.executable} -c "{child}" & wait'
    with subprocess.Popen(["sh", "-c", script], cwd=tmp_path) as parent:
        assert wait_for(tmp_path / "started") == "False"
        parent.kill()
    assert wait_for(tmp_path / "ended") == "143"


def wait_for(file: Path) -> str:
    """Return the content of a file that another process writes."""
    for _ in range(3000):
        if file.is_file() and (text := file.read_text()):
            return text
        time.sleep(0.01)
    raise TimeoutError(str(file))


def test_an_interruption_ends_all_processes_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process and its child save on SIGTERM; one that ignores the signal is killed."""
    save = f"trap 'touch {tmp_path}/$0; exit' TERM; touch {tmp_path}/started-$0; echo >&2 ready"
    wait = "while true; do sleep 0.02; done"
    stubborn = f"sh -c \"trap '' TERM; echo \\$\\$ > {tmp_path}/stubborn; {wait}\" &"
    script = f'{stubborn} sh -c "{save.replace("$0", "child")}; {wait}" & {save}; {wait}'
    monkeypatch.setattr(batch, "PATIENCE", 0.3)

    def interrupt(text: str) -> None:
        while not ((tmp_path / "started-child").exists() and (tmp_path / "stubborn").exists()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "say", interrupt)
    with pytest.raises(KeyboardInterrupt):
        batch._run_apart(["sh", "-c", script, "parent"])
    assert {"parent", "child"} <= {path.name for path in tmp_path.iterdir()}
    number = int((tmp_path / "stubborn").read_text())
    for _ in range(200):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"process {number} is still running")


def test_a_dry_run_builds_but_starts_nothing(tmp_path: Path) -> None:
    quieten()
    words = ["fit", "--model", "PaDiM", "--model.backbone.weights", "random", "--data", "Demo"]
    plan = DryRunCLI(args=[*words, "--output.root", str(tmp_path), "--trainer.accelerator", "cpu"])
    assert type(plan.model).__name__ == "PaDiM"
    plan.writer.abandon()
    assert not list(tmp_path.rglob("*.ckpt"))
