"""Configurations as people save them: encodings, and what is not a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anomaly_clip.cli import main
from anomaly_clip.commands.yaml_text import read_yaml_text
from anomaly_clip.errors import UserError

TEXT = "# Gehäuse\ndata:\n  class_path: Demo\n  init_args:\n    num_test: 2\n"
ASCII = TEXT.replace("ä", "ae")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), " is encoded in UTF-16: save it as UTF-8"),
        (ASCII.encode("utf-16-le"), " is encoded in UTF-16: save it as UTF-8"),
        (ASCII.encode("utf-16-be"), " is encoded in UTF-16: save it as UTF-8"),
        (TEXT.encode("utf-32"), " is encoded in UTF-32: save it as UTF-8"),
        (TEXT.encode("latin-1"), ", line 1: the byte 0xe4 is not UTF-8: save the file as"),
        (b"a: 1\nb: \xff\n", ", line 2: the byte 0xff is not UTF-8"),
        (b"PK\x03\x04\x00\x00" + b"text " * 9, " is not a text file: give a YAML file"),
        (b"", " is empty: write sections such as model: and data: into it"),
        (b"# nothing yet\n", " is empty"),
        (b"- a\n- b\n", " holds a list: expected sections such as model: and data:"),
        (b"hello\n", " holds a single value: expected sections"),
        (b"model: SDP\ntrainer:\n", ": trainer is empty: write options below it, or remove it"),
        (b"trainer: [1]\n", ": trainer holds ['1']: write options below it"),
        (b"output: 7\n", ": output holds 7: write options below it"),
        (b"model: [PaDiM\ndata: x\n", ", line 2: not valid YAML ("),
        (b"model: a\x01b\n", ": not valid YAML (unacceptable character"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "fit", "each"])
def test_what_is_not_a_configuration_is_named(
    verb: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert main([verb, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"anomaly_clip: --config {file}{message}"), error
    assert error.count("\n") == 1


def test_a_folder_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"--config={tmp_path}"]) == 2
    assert f"--config {tmp_path} is a folder: name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        json.dumps({"data": {"class_path": "Demo", "init_args": {"num_test": 2}}}).encode(),
        json.dumps({"data": {"class_path": "Demo"}}, indent="\t").encode(),
    ],
)
def test_a_configuration_is_read(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    sheet = tmp_path / "sheet.png"
    assert main(["preview", "--config", str(file), "--file", str(sheet)]) == 0
    assert sheet.is_file()


def test_a_sweep_file_in_another_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("method: grid\n", encoding="utf-16")
    assert main(["sweep", str(file)]) == 2
    assert f"{file} is encoded in UTF-16: save it as UTF-8" in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--config x: cannot be read \(No such file"):
        read_yaml_text(tmp_path / "x", "--config x")
