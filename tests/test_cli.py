from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_clip import __version__
from anomaly_clip.cli import main


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = (
        "import sys, anomaly_clip, anomaly_clip.cli as c; c.main(['--help']); c.main(['tset']);"
        "print([m for m in ('torch', 'numpy', 'lightning', 'yaml', 'jsonargparse') if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_options_do_not_wait_for_open_clip() -> None:
    code = (
        "import sys, anomaly_clip.commands.experiment;"
        "print({'open_clip', 'timm', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "anomaly_clip test --config" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"anomaly_clip {__version__}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset"], "unknown verb 'tset': did you mean test?"),
        (
            ["xyz"],
            "unknown verb 'xyz': known: fit, validate, test, predict, calibrate, each, compare,",
        ),
        (["--config", "a.yaml"], "--config: expected a verb first"),
    ],
)
def test_wrong_verbs(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"anomaly_clip: {message}")


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: anomaly_clip" in capsys.readouterr().out


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "anomaly_clip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"anomaly_clip {__version__}"


@pytest.mark.parametrize("command", ["configs", "configs sdp", "--help"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    code = "import sys; from anomaly_clip.cli import main; sys.exit(main(sys.argv[1:]))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_goes_on_without_a_reader(
    tiny_sdp: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out, os.fdopen(os.dup(writer), "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(["test", *tiny_sdp]) == 0
    assert (tmp_path / "runs" / "sdp" / "1-test" / "report.html").is_file()
