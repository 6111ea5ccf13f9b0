"""Completion of command lines, in Python and in bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_clip.cli import VERBS, main
from anomaly_clip.commands.completion import SHELLS, complete, completion_script
from anomaly_clip.errors import UserError


def answers(line: str) -> list[str]:
    """Return the completions of the last word; it is empty after a space."""
    words = line.split(" ")
    return complete(len(words) - 1, words, list(VERBS))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("anomaly_clip pre", ["predict", "preview"]),
        ("anomaly_clip --v", ["--version"]),
        ("anomaly_clip test --config patch", ["patchcore", "patchcore_wide"]),
        ("anomaly_clip configs data/vis", ["data/visa"]),
        ("anomaly_clip test --model Pa", ["PaDiM", "PatchCore"]),
        ("anomaly_clip fit --model A", ["APRILGAN", "AnomalyCLIP", "AnomalyDINO"]),
        ("anomaly_clip check --data Vi", ["VisA"]),
        ("anomaly_clip test --model.help SDP", ["SDP", "SDPPlus"]),
        ("anomaly_clip test --config sdp --model.sig", ["--model.sigma"]),
        ("anomaly_clip test --config sdp --model.rvs.e", ["--model.rvs.eps"]),
        ("anomaly_clip test --config = sdp --model.sig", ["--model.sigma"]),  # as bash splits it
        ("anomaly_clip test --config = winclip_4", ["winclip_4shot"]),
        ("anomaly_clip test --model PatchCore --model.upsampling ", ["bilinear", "nearest"]),
        ("anomaly_clip test --output.page ", ["false", "true"]),
        ("anomaly_clip fit --calibrat", ["--calibrate", "--calibration.alpha"]),
        ("anomaly_clip test --help", ["--help", "--help.all"]),
        ("anomaly_clip report --verif", ["--verify"]),
        ("anomaly_clip export --data.r", ["--data.root"]),
        ("anomaly_clip preview --imag", ["--images"]),
        ("anomaly_clip each --re", ["--resume"]),
        ("anomaly_clip --print_completion b", ["bash"]),
        ("anomaly_clip test --data.root ", []),  # the shell completes names of files
        ("anomaly_clip test --config no_such_config --model.s", []),
        ("anomaly_clip nonsense --conf", []),
    ],
)
def test_answers(line: str, expected: list[str]) -> None:
    given = answers(line)
    if line.endswith(("calibrat", "patch")):
        assert set(expected) & set(given)
    else:
        assert given == expected


def test_all_verbs_come_first() -> None:
    assert set(VERBS) <= set(answers("anomaly_clip "))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_options(verb: str) -> None:
    assert "--help" in answers(f"anomaly_clip {verb} -")


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_completion", shell]) == 0
    assert capsys.readouterr().out.strip() == completion_script(shell)


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="expected one of bash, zsh, fish"):
        completion_script("tcsh")
    assert main(["--print_completion"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["x"], ["9", "anomaly_clip"], ["1"]])
def test_odd_requests_have_no_answer_or_some_words(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--complete", *words]) == 0
    assert not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "anomaly_clip"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m anomaly_clip "$@"\n')
    program.chmod(0o755)
    script = f"""
export PATH={tmp_path}:$PATH
eval "$(anomaly_clip --print_completion bash)"
COMP_WORDS=(anomaly_clip test --config sdp --model.sig); COMP_CWORD=4
_anomaly_clip
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "--model.sigma\n", done.stderr


@pytest.mark.slow
def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from anomaly_clip.cli import main; "
        "main('--complete 4 anomaly_clip test --config sdp --mod'.split()); "
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
