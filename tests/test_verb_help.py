"""``--help``: what a reader looks for comes first, at once, in 80 columns."""

import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_clip.cli import main
from anomaly_clip.commands.named_classes import named_options
from anomaly_clip.commands.verb_help import EXPERIMENTS, asks_for_help, help_text
from anomaly_clip.errors import UserError


def lines_of(command: str) -> list[str]:
    return help_text(command.split()).splitlines()


@pytest.mark.parametrize("verb", EXPERIMENTS)
@pytest.mark.parametrize("options", ["--help", "--config sdp --help", "--config tab --help.all"])
def test_it_fits_80_columns_and_begins_with_the_usage(verb: str, options: str) -> None:
    lines = lines_of(f"{verb} {options}")
    assert lines[0].startswith(f"usage: anomaly_clip {verb} ")
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("verb", EXPERIMENTS)
def test_the_trainer_comes_last(verb: str) -> None:
    text = help_text([verb, "--config", "sdp", "--help"])
    order = ["--model.sigma", "--data.root", "--output.root", "--calibration.alpha", "--config "]
    places = [text.index(f"\n  {option}") for option in (*order, "--trainer.devices")]
    assert places == sorted(places)
    assert "--trainer.model_registry" in text.splitlines()[-1]


def test_without_names_it_is_short_and_lists_them() -> None:
    lines = lines_of("test --help")
    assert len(lines) < 160
    assert any(line.startswith("  --model PatchCore ") for line in lines)
    assert any(line.startswith("  --data VisA ") for line in lines)
    assert "--model.sigma" not in "\n".join(lines)


def test_values_are_those_of_the_configuration_and_the_command_line() -> None:
    text = help_text(["test", "--config", "sdp", "--help"])
    assert "--model.sigma  float, configured: 8.0" in text
    assert "--model.backbone.positions" in text
    text = help_text(["test", "--config", "sdp", "--model.sigma=3", "--data", "Demo", "-h"])
    assert "--model.sigma  float, configured: 3" in text
    assert "--data.num_train  int, default: 100" in text
    assert "--data.root" not in text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--model SDP --help", "--model.sigma"),
        ("--model.help SDP", "--model.sigma"),
        ("--config sdp --model.help", "--model.sigma"),
        ("--data.help Demo", "--data.num_train"),
        ("--model=anomaly_clip.methods.SDP --nonsense 3 --help", "--model.sigma"),
        ("--config data/visa --help", "--data.shots"),
    ],
)
def test_forms_of_asking(words: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *words.split()]) == 0
    assert shown in capsys.readouterr().out


def test_a_section_alone_has_nothing_else() -> None:
    text = help_text(["test", "--config", "sdp", "--model.help"])
    assert "--data." not in text
    assert "--trainer." not in text


def test_a_wrong_class_is_shown_with_the_choices() -> None:
    text = help_text(["test", "--model", "SPD", "--help"])
    assert "--model SPD: there is no such class; did you mean SDP" in text
    assert "--model PatchCore" in text


@pytest.mark.parametrize("content", [None, "model: [", "- 1", ""])
@pytest.mark.parametrize("name", ["bad", "bad.yaml"])
def test_a_bad_configuration_is_one_sentence(
    name: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["test", "--config", str(tmp_path / name), "--help"]) == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1
    assert not out.out
    with pytest.raises(UserError):
        named_options(["test", "--config", str(tmp_path / name)])


@pytest.mark.parametrize("place", ["", "checkpoints/last.ckpt"])
def test_a_checkpoint_names_its_method(place: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "config-fit.yaml").write_text(
        "model: {class_path: anomaly_clip.methods.PaDiM, init_args: {sigma: 5.5}}\n"
    )
    text = help_text(["test", "--ckpt_path", str(tmp_path / place), "--help"])
    assert "--model.sigma  float, configured: 5.5" in text
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "3-fit").symlink_to(tmp_path)
    short = ["test", "--ckpt_path", str(tmp_path / "runs" / "3"), "--help"]
    assert "--model.sigma  float, configured: 5.5" in help_text(short)
    (tmp_path / "config-fit.yaml").write_text("model: [")
    assert "--model PatchCore" in help_text(["test", "--ckpt_path", str(tmp_path), "--help"])


def test_a_class_of_the_working_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_module.py").write_text(
        'raise SystemExit\nclass Mine:\n    """My."""\n    def __init__(self, tau: int = 3): ...\n'
    )
    monkeypatch.chdir(tmp_path)
    assert "--model.tau  int, default: 3" in help_text(["fit", "--model", "my_module.Mine", "-h"])


@pytest.mark.parametrize("verb", ["export", "benchmark", "compare"])
def test_verbs_with_options_of_their_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--config", "sdp", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: anomaly_clip {verb}")
    assert "--model.sigma" in text
    assert ("--data.mask_size" in text) == (verb == "compare")


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_verbs_of_data_sets(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--data", "ImageFolder", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--data.test_share" in text
    assert "--model" not in text


def test_which_words_ask_for_it() -> None:
    assert asks_for_help(["fit", "--help.all"])
    assert not asks_for_help(["fit", "--trainer.callbacks.help", "ModelCheckpoint"])
    assert not asks_for_help(["report", "--help"])


@pytest.mark.slow
def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from anomaly_clip.cli import main; "
        "main('test --config sdp --data VisA --help'.split()); "
        "heavy = {'torch', 'lightning', 'numpy', 'cv2', 'jsonargparse'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
