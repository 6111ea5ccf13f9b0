"""Tests of the files of a calibration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.errors import UserError
from anomaly_clip.recording.calibration_files import (
    calibration_file,
    earlier_version,
    is_version_of,
    write_into_checkpoint,
)
from anomaly_clip.recording.run_conditions import file_sha256

CALIBRATION = Calibration("PaDiM", {"nut": CategoryCalibration((1.0, 2.0))})


def test_a_checkpoint_keeps_its_content_and_its_earlier_hashes(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.arange(3)}, "epoch": 4}, file)
    first = file_sha256(file)
    beside = write_into_checkpoint(CALIBRATION, file)
    second = file_sha256(file)
    write_into_checkpoint(CALIBRATION, file)
    content = torch.load(file, weights_only=True)
    assert content["state_dict"]["a"].tolist() == [0, 1, 2]
    assert content["epoch"] == 4
    assert content["calibration"] == CALIBRATION.as_dict()
    assert Calibration.read(beside) == Calibration.from_dict(content["calibration"], "")
    assert first is not None
    assert second is not None
    assert is_version_of(file, first)
    assert is_version_of(file, second)
    assert not is_version_of(file, "f" * 64)
    assert earlier_version(file, str(file_sha256(file)), tmp_path) == file
    for sha256, calibration in ((first, None), (second, CALIBRATION.as_dict())):
        copy = earlier_version(file, sha256, tmp_path / "copies")
        earlier = torch.load(copy, weights_only=True)
        assert earlier.get("calibration") == calibration
        assert earlier["state_dict"]["a"].tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "copies")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.json", "last.ckpt"]


def test_only_the_newest_calibrations_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}}, file)
    hashes = []
    for _ in range(7):
        hashes.append(str(file_sha256(file)))
        write_into_checkpoint(CALIBRATION, file)
    assert len(set(hashes)) == 7
    assert [is_version_of(file, sha256) for sha256 in hashes] == [False] * 2 + [True] * 5


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_checkpoints_are_no_version(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    assert not is_version_of(tmp_path / "last.ckpt", "f" * 64)


def test_folders_stand_for_the_file_in_them(tmp_path: Path) -> None:
    run, zero_shot = tmp_path / "fit", tmp_path / "sdp"
    CALIBRATION.write(run / "checkpoints" / "calibration.json")
    CALIBRATION.write(zero_shot / "calibration.json")
    assert calibration_file(str(run)) == run / "checkpoints" / "calibration.json"
    assert calibration_file(str(zero_shot)) == zero_shot / "calibration.json"
    assert calibration_file(str(zero_shot / "calibration.json")).is_file()
    with pytest.raises(UserError, match=r"missing: there is no calibration.json"):
        calibration_file("missing")
