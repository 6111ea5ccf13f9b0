from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folder import make_run

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


LIGHT = [
    ["configs"],
    ["fit", "--help", "--config", "padim"],
    ["report", "--help"],
    ["report", "--table", "clip_ad", "--dry-run"],
    ["report", "RUN"],
    ["report", "RUN", "--protocol"],
]
"""Command lines that need no torch."""
OPTIONAL = {"open_clip", "timm", "sklearn", "pandas", "albumentations", "wandb", "matplotlib"}
OPTIONAL |= {"onnx", "onnxruntime", "onnxscript"}
PATCHCORE = ["--model=PatchCore", "--model.backbone.name=squeezenet1_1", "--model.image_size=64"]
PATCHCORE += ["--model.backbone.weights=random", "--model.layers=[features.4.cat]", "--data=Demo"]
PATCHCORE += ["--data.categories=[black leather]", "--data.num_train=2", "--data.num_test=2"]
LOADED = """
import contextlib, io, json, sys
from anomaly_clip.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(words) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted({name for name in sys.modules if "." not in name})]))
"""


def loaded(*lines: list[str]) -> set[str]:
    """Return the top-level modules that command lines load in a new process; all must succeed."""
    words = [sys.executable, "-c", LOADED, json.dumps(lines)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    codes, names = json.loads(done.stdout)
    assert codes == [0] * len(lines)
    return set(names)


@pytest.mark.slow
def test_reports_and_help_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"cap": ([0.1, 0.9], [0, 1])})
    lines = [[str(run) if word == "RUN" else word for word in words] for words in LIGHT]
    assert loaded(*lines) & {"torch", "lightning", "scipy", *OPTIONAL} == set()


@pytest.mark.slow
def test_a_method_loads_only_what_it_needs(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    fit = ["fit", *PATCHCORE, "--output.folder", run]
    test = ["test", "--ckpt_path", run, "--output.folder", str(tmp_path / "test")]
    names = loaded(fit, test)
    assert "torch" in names
    # The random projection of PatchCore needs scikit-learn, which imports pandas if it is there.
    assert names & OPTIONAL == {"sklearn", "pandas"} & names


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
