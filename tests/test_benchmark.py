"""``anomaly_clip benchmark``: the table of an exported folder and of a run, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import save_picture
from small_programs import write_detector, write_program

from anomaly_clip.cli import main
from anomaly_clip.errors import UserError
from anomaly_clip.exporting import measurement
from anomaly_clip.exporting.programs import OLDEST_TORCH

FAST = ["--seconds", "0.01", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_detector(tmp_path / "detector")


def test_an_exported_folder_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    words = ["--runtimes", "[onnxruntime, torch]", "--batch_sizes", "[2]", "--images", "3"]
    assert main(["benchmark", str(folder), *words, *FAST, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    torch_row, row = content["rows"]
    assert torch_row["error"] == (
        "the folder holds detector.onnx only: give the run that it was exported from"
    )
    assert (row["runtime"], row["batch_size"], row["error"]) == ("onnxruntime", 2, None)
    assert row["difference"]["anomaly_map"] < 1e-6
    assert row["difference"]["flips"] == 0
    assert 0 < row["fastest_ms"] <= row["quartiles_ms"][0] <= row["ms_per_image"]
    assert row["fastest_processor_ms"] >= 0
    assert row["file_bytes"] == (folder / "detector.onnx").stat().st_size
    assert content["images"] == {"count": 5, "source": "the 2 of check/ and 3 generated images"}
    assert content["reading"]["images"] == "a generated PNG, 1024 x 1024 pixels"
    assert content["choice"]["row"] == "onnxruntime, batch 2"
    assert sorted(folder.rglob("*")) == before


def test_a_program_that_decides_differently_is_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_detector(tmp_path / "detector", gain=1.1)
    photos = tmp_path / "photos"
    save_picture(photos / "a.png", size=50)
    numbers = tmp_path / "numbers.json"
    words = ["--runtimes=onnxruntime", "--batch_sizes=1", "--json", str(numbers)]
    assert main(["benchmark", str(folder), *words, *FAST, "--data.root", str(photos)]) == 0
    shown = capsys.readouterr().out
    assert f"the 2 of check/ and 1 image of {photos}" in shown
    assert "Decoding and resizing take" in shown
    assert "50 x 50 pixels" in shown
    assert "Choose none: there is no row in which no decision flips." in shown
    [row] = json.loads(numbers.read_text())["rows"]
    assert row["difference"]["flips"] == 1
    assert row["difference"]["image_score"] == pytest.approx(0.1, rel=1e-3)


MISTAKES = {
    "--threads 0": "--threads must be 1 or more, got 0",
    "--seconds 0": "--seconds must be above 0, got 0.0",
    "--seconds nan": "--seconds must be above 0, got nan",
    "--images 1": "--images must be 2 or more, got 1",
    "--batch_sizes [0]": "--batch_sizes must be 1 or more, got 0",
    "--batch_sizes []": "--batch_sizes is empty",
    "--batch_sizes many": "'many': give whole numbers",
    "--runtimes tensorrt": "--runtimes tensorrt: unknown",
    "--runtimes []": "--runtimes is empty",
    "--data.category plank": "--data.category: ",
    "--model.sigma 4": "--model.sigma: ",
    "--data.root nowhere": "--data.root nowhere: there is no such folder",
    "--json .": "--json . is a folder",
    "--fast": "unrecognized arguments: --fast",
    "--threads": "expected one argument",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_a_sentence(
    folder: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(folder), *words.split(" ")]) == 2
    captured = capsys.readouterr()
    assert MISTAKES[words] in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def damage_record(folder: Path) -> None:
    (folder / "detector.json").write_text("{")


def raise_format(folder: Path) -> None:
    (folder / "detector.json").write_text('{"format": 2}')


def lack_keys(folder: Path) -> None:
    (folder / "detector.json").write_text('{"format": 1}')


def lack_keys_of_a_part(folder: Path) -> None:
    record = json.loads((folder / "detector.json").read_text())
    del record["preprocessing"]["filter"]
    (folder / "detector.json").write_text(json.dumps(record))


def remove_check(folder: Path) -> None:
    shutil.rmtree(folder / "check")


def damage_check(folder: Path) -> None:
    (folder / "check" / "expected.npz").write_bytes(b"nothing")


@pytest.mark.parametrize(
    "damage",
    [damage_record, raise_format, lack_keys, lack_keys_of_a_part, remove_check, damage_check],
)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert main(["benchmark", str(folder)]) == 2
    captured = capsys.readouterr()
    assert str(folder) in captured.err
    assert "export the detector again" in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_another_program_than_that_of_the_export_is_a_row_with_its_reason(
    folder: Path, tmp_path: Path
) -> None:
    write_program(folder / "detector.onnx", gain=1.1)
    save_picture(tmp_path / "photos" / "a.png", size=50)
    subject = measurement.subject_of_folder(folder, ["onnxruntime"], 1, tmp_path / "photos")
    [row] = subject.programs
    assert row.error == (
        f"{folder / 'detector.onnx'}: missing, or not the file of the export: export the detector "
        f"again"
    )


def test_damaged_images_are_passed_over(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save_picture(photos / "b.png", size=50)
    (photos / "a.png").write_bytes(b"damaged")
    subject = measurement.subject_of_folder(folder, ["onnxruntime"], 2, photos)
    assert len(subject.images) == 2 + 1
    assert subject.reading.images == "such as the first image, 50 x 50 pixels"
    save_picture(photos / "b.png", size=50).write_bytes(b"damaged")
    with pytest.raises(UserError, match="can be read"):
        measurement.subject_of_folder(folder, ["onnxruntime"], 2, photos)


def test_nothing_to_measure_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark"]) == 2
    assert "name one detector" in capsys.readouterr().err
    assert main(["benchmark", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_configuration_is_exported_and_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", minversion=OLDEST_TORCH)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    words = ["--config", "sdp", "--model.backbone.pretrained", "demo", "--data.category", "plank"]
    some = ["--runtimes", "[onnxruntime]", "--batch_sizes", "[1]", "--images", "2"]
    assert main(["benchmark", *words, *some, *FAST, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    [row] = content["rows"]
    assert row["error"] is None
    assert row["difference"]["anomaly_map"] < 1e-5
    assert (content["method"], content["category"], content["reference"]) == (
        "SDP",
        "plank",
        "torch",
    )
    assert list(work.iterdir()) == []


def test_a_format_that_cannot_be_written_is_a_row_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise UserError("SDP cannot be traced")

    monkeypatch.setattr(measurement, "export_detector", refused)
    words = ["--config", "sdp", "--model.backbone.pretrained", "demo", "--data.category", "plank"]
    some = ["--runtimes", "[onnxruntime, torch_export]", "--images", "2"]
    assert main(["benchmark", *words, *some, *FAST]) == 1
    shown = capsys.readouterr().out
    assert shown.count("failed") == 4
    assert "torch_export, batch 8: SDP cannot be traced\n" in shown
    assert shown.endswith("Choose none: no row could be measured.\n")


@pytest.mark.slow
def test_the_method_itself_is_measured_as_predict_runs_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--config", "sdp", "--model.backbone.pretrained", "demo", "--data.category", "plank"]
    some = ["--runtimes", "[torch, torch_export]", "--batch_sizes", "[1]", "--images", "2"]
    assert main(["benchmark", *words, *some, *FAST, "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["runtime"] for row in content["rows"]] == ["torch", "torch_export"]
    for row in content["rows"]:
        assert row["error"] is None
        assert row["difference"]["anomaly_map"] < 1e-6
