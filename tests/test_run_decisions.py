"""The calibration of a run, found."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.errors import UserError
from anomaly_clip.recording.run_decisions import RunDecisions, find_calibration

CALIBRATION = Calibration("PaDiM", {"cap": CategoryCalibration((1.0, 2.0))})
OTHER = Calibration("PaDiM", {"nut": CategoryCalibration((1.0, 2.0))})


@pytest.mark.parametrize(
    "place", ["calibration.json", "checkpoints/calibration.json", "other.json"]
)
def test_a_file_or_the_folder_of_a_run(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run" / place
    file.parent.mkdir(parents=True)
    CALIBRATION.write(file)
    given = [file] if place == "other.json" else [file, tmp_path / "run"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in [*map(str, given), f"~/run/{place}"]:
        chosen = find_calibration(value, OTHER.as_dict())
        assert chosen is not None
        assert list(chosen[0].categories) == ["cap"]  # before that of the checkpoint
        assert chosen[1] == str(file)


@pytest.mark.parametrize("given", ["nothing", "", "~nobody-of-this-name/run"])
def test_a_calibration_that_is_not_there(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"calibration.file {given}: "):
        find_calibration(given, None)


def test_the_calibration_of_the_checkpoint() -> None:
    assert find_calibration(None, None) is None
    source = "the checkpoint"
    expected = (Calibration.from_dict(CALIBRATION.as_dict(), source), source)
    assert find_calibration(None, CALIBRATION.as_dict()) == expected
    with pytest.raises(UserError, match="the checkpoint: no calibration, or a damaged one"):
        find_calibration(None, {"format": 1})


@pytest.mark.parametrize("fdr", [0.0, 1.0, -0.1, float("nan")])
def test_a_false_discovery_rate_is_between_0_and_1(fdr: float) -> None:
    with pytest.raises(ValueError, match=r"output\.fdr must be in \(0, 1\)"):
        RunDecisions(fdr)


def test_without_a_calibration_nothing_changes(tmp_path: Path) -> None:
    decisions = RunDecisions()
    rows = {0: {"path": "a.png", "category": "cap", "image_score": 1.0}}
    ranges = {"cap": [0.0, 1.0]}
    assert decisions.decide(rows, ranges, replaces_score=True) is ranges
    assert "decision" not in rows[0]
    assert decisions.record(tmp_path, rows, {}) is None
    assert (decisions.num_anomalous, decisions.map_thresholds) == (0, {})
    assert not list(tmp_path.iterdir())
