"""A full disk ends every command in one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from anomaly_clip import cli
from anomaly_clip.cli import main
from anomaly_clip.errors import FULL, explain
from anomaly_clip.files import write_bytes
from anomaly_clip.recording.run_log import RunLogger

NO_SPACE = "No space left on device"
WAY_OUT = "free space there, or choose another folder"


@pytest.mark.parametrize("verb", list(cli.VERBS))
@pytest.mark.parametrize("number", [*FULL, errno.EACCES, errno.EROFS])
def test_every_verb_names_the_file(
    verb: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: Any) -> int:
        raise OSError(number, os.strerror(number), "runs/1/each.json")

    monkeypatch.setattr(cli, "_run", run)
    assert main([verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anomaly_clip: ")
    assert "runs/1/each.json" in line
    assert (WAY_OUT in line) is (number in FULL)
    with pytest.raises(OSError, match=r"each\.json"):
        main([verb, "--traceback"])


def test_the_first_cause_is_named() -> None:
    """Lightning saves its log again after a failure, in a folder that is then removed."""

    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, NO_SPACE, "runs/1/logs")
        finally:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "metrics.csv")

    with pytest.raises(FileNotFoundError) as caught:
        fail()
    assert explain(caught.value) == f"runs/1/logs: {NO_SPACE}: {WAY_OUT}"
    assert explain(OSError(errno.ENOSPC, NO_SPACE)) == f"{NO_SPACE}: {WAY_OUT}"


def test_an_error_of_this_package_keeps_its_sentence(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    place = str(Path(cli.__file__).with_name("made_up.py"))
    code = compile("def fail(error):\n    raise error", place, "exec")
    exec(code, namespace)
    for error, expected in (
        (OSError("last.ckpt: no space: this checkpoint is not saved"), "this checkpoint"),
        (OSError(errno.ENOSPC, NO_SPACE, "scores.csv"), f"scores.csv: {NO_SPACE}: {WAY_OUT}"),
    ):
        with pytest.raises(OSError, match=r"last\.ckpt|scores") as caught:
            namespace["fail"](error)
        assert expected in explain(caught.value)


def test_the_log_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: CSVLogger) -> None:
        raise OSError(errno.ENOSPC, NO_SPACE)

    monkeypatch.setattr(CSVLogger, "save", save)
    writer: Any = SimpleNamespace(root=str(tmp_path), folder=tmp_path / "1", requested_folder=None)
    with pytest.raises(OSError, match="logs") as caught:
        RunLogger(writer, "fit").save()
    assert caught.value.filename == str(tmp_path / "1" / "logs")


def test_bytes_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a" / "weights.pt"
    write_bytes(file, memoryview(b"first"))
    with pytest.raises(TypeError):
        write_bytes(file, "text")  # type: ignore[arg-type]
    assert file.read_bytes() == b"first"
    assert [path.name for path in file.parent.iterdir()] == ["weights.pt"]
