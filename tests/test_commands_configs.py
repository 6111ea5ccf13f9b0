from __future__ import annotations

import re
from pathlib import Path

import pytest

from anomaly_clip.cli import main
from anomaly_clip.commands import configs
from anomaly_clip.commands.configs import config_file, config_names, expand_configs
from anomaly_clip.errors import UserError

ROOT = Path(__file__).parent.parent


def test_every_file_of_the_folder_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    files = [f.relative_to(ROOT / "configs") for f in (ROOT / "configs").rglob("*.yaml")]
    assert config_names() == sorted(str(file.with_suffix("")) for file in files)
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names()
    assert all(len(line.split()) > 3 for line in lines)  # each has a summary


@pytest.mark.parametrize("name", ["sdp", "sdp.yaml", "configs/sdp.yaml", "configs/sdp"])
def test_a_name_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "configs" / "sdp.yaml")
    assert config_file(name) == expected
    assert expand_configs(["test", "--config", name, "--data.root", "sdp"]) == [
        *("test", "--config", expected, "--data.root", "sdp")
    ]
    assert expand_configs([f"--config={name}", "-c", name]) == [
        *(f"--config={expected}", "-c", expected)
    ]


def test_a_file_of_the_working_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sdp.yaml").write_text("seed_everything: 1\n")
    assert config_file("sdp.yaml") == "sdp.yaml"
    assert config_file("sdp") == str(ROOT / "configs" / "sdp.yaml")


def test_a_wrong_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", "winclp"]) == 2
    assert "--config winclp: neither a file nor" in (error := capsys.readouterr().err)
    assert "did you mean winclip?" in error
    with pytest.raises(UserError, match="anomaly_clip configs lists all"):
        expand_configs(["--config=qqq"])


def test_one_configuration_is_printed_to_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "data/visa"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "data" / "visa.yaml").read_text()


def test_a_real_run_takes_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--config", "demo", "--print_config"]) == 0
    assert "class_path: anomaly_clip.methods.SDP" in capsys.readouterr().out


def test_a_wheel_contains_the_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'force-include\]\n"configs" = "anomaly_clip/configs"', text)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sdp.yaml").write_text("")
    monkeypatch.setattr(configs, "FOLDERS", (tmp_path / "configs", ROOT / "nowhere"))
    assert config_names() == ["sdp"]
    monkeypatch.setattr(configs, "FOLDERS", (ROOT / "nowhere",))
    with pytest.raises(UserError, match="reinstall"):
        config_names()


def test_a_sweep_file_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "sweeps/demo", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("--model.lr=") == 4
