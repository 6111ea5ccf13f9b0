from __future__ import annotations

import pytest

from anomaly_clip.progress import track


@pytest.mark.parametrize("count", [1, 3])
def test_a_terminal_sees_a_bar(
    count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    assert list(track(range(count), "counting")) == list(range(count))
    assert "counting" in capsys.readouterr().err


def test_a_file_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "counting")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_other_processes_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("anomaly_clip.progress.rank_zero_only.rank", 1)
    assert list(track([1], "counting")) == [1]
    assert capsys.readouterr().err == ""
