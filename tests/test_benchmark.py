"""``anomaly_clip benchmark``: processes that take turns, the table, the choice, and mistakes."""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from anomaly_clip.cli import main
from anomaly_clip.errors import UserError
from anomaly_clip.exporting import measurement, timing
from anomaly_clip.exporting.measurement import subject_of_folder
from anomaly_clip.exporting.parity import Difference
from anomaly_clip.exporting.timed_process import answer, peak_memory
from anomaly_clip.exporting.timing import Program, Timing, choose, measure
from tests.helpers import save_picture

SIDE = 32
FAST = ["--seconds", "0.01", "--threads", "1"]


def write_program(file: Path, gain: float = 1.0) -> Path:
    """Write a program whose map is the mean over the colours, and whose score is its mean."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "gain"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "colours"], ["anomaly_map"], keepdims=0),
        helper.make_node("ReduceMean", ["anomaly_map", "sides"], ["image_score"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", SIDE, SIDE]),
        ],
        [
            helper.make_tensor("gain", TensorProto.FLOAT, [], [gain]),
            helper.make_tensor("colours", TensorProto.INT64, [1], [1]),
            helper.make_tensor("sides", TensorProto.INT64, [2], [1, 2]),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def images(count: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)


def program(file: Path, runtime: str = "onnxruntime") -> Program:
    job = {"file": str(file), "session": runtime, "precision": "float32"}
    return Program(runtime, "float32", job, file.stat().st_size if file.exists() else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an exported detector, calibrated at the mean of images: half of them are anomalous."""
    target = tmp_path / "detector"
    (target / "check").mkdir(parents=True)
    file = write_program(target / "detector.onnx")
    checked = images(2)
    maps = checked.mean(axis=1, dtype=np.float32)
    outputs = {"image_score": maps.mean(axis=(1, 2)), "anomaly_map": maps}
    np.savez(target / "check" / "expected.npz", images=checked, **outputs)
    record = {
        "format": 1,
        "method": "Mean",
        "category": "plank",
        "program": {
            "file": file.name,
            "format": "onnx",
            "precision": "float32",
            "bytes": file.stat().st_size,
            "external_data": None,
        },
        "preprocessing": {
            "image_size": SIDE,
            "rule": "square",
            "size": None,
            "filter": "bicubic",
            "bit_depth": None,
            "max_pixels": 10**7,
        },
        "calibration": {
            "part_ranges": None,
            "levels": [{"threshold": float(np.mean(outputs["image_score"]))}],
        },
        "remarks": [],
    }
    (target / "detector.json").write_text(json.dumps(record))
    return target


# -- the process -----------------------------------------------------------------------------------


def mean_of(job: object) -> Any:
    return lambda batch: {"image_score": batch.mean(axis=(1, 2, 3), dtype=np.float32)}


def answers(tmp_path: Path, lines: Sequence[str], batch_size: int, run: Any) -> list[Any]:
    np.save(tmp_path / "images.npy", images(4))
    job = {
        "images": str(tmp_path / "images.npy"),
        "outputs": str(tmp_path / "outputs.npz"),
        "batch_size": batch_size,
    }
    output = io.StringIO()
    answer(io.StringIO("\n".join([json.dumps(job), *lines]) + "\n"), output, run)
    return [json.loads(line) for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_the_outputs_are_those_of_each_image_once(tmp_path: Path, batch_size: int) -> None:
    sizes: list[int] = []

    def counting(job: object) -> Any:
        def run(batch: np.ndarray) -> dict[str, Any]:
            sizes.append(len(batch))
            return mean_of(job)(batch)

        return run

    assert answers(tmp_path, ["outputs"], batch_size, counting) == [
        {"ready": True},
        {"written": True},
    ]
    assert set(sizes[1:]) == {batch_size}, "after the first image, whole batches only"
    with np.load(tmp_path / "outputs.npz") as outputs:
        expected = images(4).mean(axis=(1, 2, 3), dtype=np.float32)
        np.testing.assert_array_equal(outputs["image_score"], expected)


def test_at_least_one_batch_is_timed_and_more_until_the_time_is_over(tmp_path: Path) -> None:
    _, short, longer, memory = answers(tmp_path, ["run 0", "run 0.05", "memory"], 2, mean_of)
    assert len(short["times"]) == 1
    assert sum(longer["times"][:-1]) < 0.05 <= sum(longer["times"])
    assert 1e6 < memory["memory"] <= (peak_memory() or 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("the opset 99 is unknown\nat line 3"), "the opset 99 is unknown"),
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("Failed to allocate 4 GB"), "out of memory (RuntimeError)"),
        (KeyError(), "KeyError"),
        (SystemExit(2), "SystemExit: 2"),
    ],
)
def test_an_error_of_a_program_is_a_reason(tmp_path: Path, error: Exception, reason: str) -> None:
    def fails(job: object) -> Any:
        raise error

    assert answers(tmp_path, ["outputs"], 1, fails) == [{"error": reason}]


# -- rows ------------------------------------------------------------------------------------------


def test_each_row_is_measured_in_a_process_without_torch(tmp_path: Path) -> None:
    file = write_program(tmp_path / "a.onnx")
    rows = measure([program(file)], [1, 3], images(), threads=1, seconds=0.01, rounds=2)
    assert [row.name for row in rows] == ["onnxruntime, batch 1", "onnxruntime, batch 3"]
    expected = images().mean(axis=1, dtype=np.float32)
    for row in rows:
        assert row.error is None
        assert len(row.times) >= 2
        assert row.start is not None
        assert row.memory is not None
        # Not that of this process at the time of the fork, which has imported torch.
        assert row.memory < 200e6 < (peak_memory() or 0)
        assert row.quartiles[0] <= row.seconds <= row.quartiles[1]
        assert row.seconds == statistics.median(row.times) / row.batch_size
        np.testing.assert_allclose(row.outputs["anomaly_map"], expected, rtol=1e-5)


def test_a_row_that_fails_has_a_reason_and_the_others_are_measured(tmp_path: Path) -> None:
    good = write_program(tmp_path / "good.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"no program")
    programs = [
        program(tmp_path / "damaged.onnx"),
        Program("openvino", "float32", error="the package openvino is not installed"),
        program(good),
    ]
    rows = measure(programs, [2], images(), threads=1, seconds=0.01, rounds=1)
    assert "damaged.onnx" in (rows[0].error or "")
    assert rows[1].error == "the package openvino is not installed"
    assert (rows[2].error, len(rows[2].outputs)) == (None, 2)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "its process was ended by SIGKILL: the memory has probably run out",
        ),
        ("raise RuntimeError('no disk')", "its process ended with exit code 1: RuntimeError: no"),
        ("print('{')", "its process ended with exit code 0"),
    ],
)
def test_a_process_that_ends_by_itself_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    (tmp_path / "ends_early.py").write_text(code.replace("'{'", "'', end=''"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(timing, "MODULE", "ends_early")
    [row] = measure([Program("torch", "float32")], [1], images(), threads=1, seconds=1)
    assert (row.error or "").startswith(reason)


def test_after_a_signal_no_process_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupted(rows: Sequence[Timing], title: str) -> Iterable[Timing]:
        yield rows[0]
        raise KeyboardInterrupt

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(timing.subprocess, "Popen", Recorded)
    file = write_program(tmp_path / "a.onnx")
    with pytest.raises(KeyboardInterrupt):
        measure([program(file)], [1, 2], images(), threads=1, seconds=1, watch=interrupted)
    assert [process.returncode is None for process in started] == [False]
    assert list(scratch.iterdir()) == []


def row_of(
    runtime: str, milliseconds: float | None, batch_size: int = 1, precision: str = "float32"
) -> Timing:
    row = Timing(Program(runtime, precision), batch_size)
    if milliseconds is None:
        row.error = "not installed"
    else:
        row.times = [milliseconds * batch_size / 1000] * 3
    return row


EQUAL, FLIPPED, FAR = Difference(0.0, 1e-7, None, 0), Difference(0.0, 0.1, None, 2), 1e-3


@pytest.mark.parametrize(
    ("rows", "differences", "sentence"),
    [
        (
            [row_of("torch", 20), row_of("onnxruntime", 10), row_of("openvino", 5)],
            [EQUAL, EQUAL, FLIPPED],
            "Choose onnxruntime, batch 1: 10 ms an image, 2 times as fast as torch, batch 1, and "
            "no decision flips compared with torch.",
        ),
        (
            [row_of("torch", 20), row_of("onnxruntime", 10), row_of("openvino", 10)],
            [EQUAL, EQUAL, EQUAL],
            "Choose onnxruntime, batch 1: 10 ms an image, 2 times as fast as torch, batch 1, and "
            "no decision flips compared with torch; as fast within the spread: openvino, batch 1.",
        ),
        (
            [row_of("torch", 4, 8), row_of("onnxruntime", 10), row_of("openvino", None)],
            [Difference(0.0, 0.0), Difference(0.0, 1e-7), None],
            "Choose torch, batch 8: 4 ms an image, and its maps are equal but for rounding "
            "compared with torch.",
        ),
        (
            [row_of("torch", None), row_of("onnxruntime", 3, 1, "int8")],
            [None, Difference(0.0, FAR)],
            "Choose none: there is no row in which maps differ by at most 1e-05.",
        ),
        ([row_of("torch", 1)], [FLIPPED], "Choose none: there is no row in which no decision"),
        ([row_of("torch", None)], [None], "Choose none: no row could be measured."),
        (
            [row_of("torch", 9), row_of("onnxruntime", 3)],
            [Difference(0.0), Difference(FAR)],
            "Choose torch, batch 1: 9 ms an image, and",
        ),
    ],
)
def test_the_choice_is_the_fastest_row_whose_decisions_are_those_of_torch(
    rows: list[Timing], differences: list[Difference | None], sentence: str
) -> None:
    assert choose(rows, differences, "torch").sentence.startswith(sentence)


# -- the command -----------------------------------------------------------------------------------


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
    assert row["file_bytes"] == (folder / "detector.onnx").stat().st_size
    assert content["images"] == {"count": 5, "source": "the 2 of check/ and 3 generated images"}
    assert content["reading"]["images"] == "a generated PNG, 1024 x 1024 pixels"
    assert content["choice"]["row"] == "onnxruntime, batch 2"
    assert sorted(folder.rglob("*")) == before


def test_a_program_that_decides_differently_is_not_chosen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(folder / "detector.onnx", gain=1.1)
    photos = tmp_path / "photos"
    save_picture(photos / "a.png", size=50)
    numbers = tmp_path / "numbers.json"
    words = ["--runtimes=onnxruntime", "--batch_sizes=1", "--json", str(numbers)]
    assert main(["benchmark", str(folder), *words, *FAST, "--data.root", str(photos)]) == 0
    shown = capsys.readouterr().out
    assert f"the 2 of check/ and 1 images of {photos}" in shown
    assert "Decoding and resizing take" in shown
    assert "50 x 50 pixels" in shown
    assert "Choose none: there is no row in which no decision flips." in shown
    [row] = json.loads(numbers.read_text())["rows"]
    assert row["difference"]["flips"] == 1
    assert row["difference"]["image_score"] == pytest.approx(0.1, rel=1e-3)


def test_the_parts_of_scores_are_scaled_before_decisions_are_compared(folder: Path) -> None:
    subject = subject_of_folder(folder, ["onnxruntime"], 1)
    calibration = {"part_ranges": [[0, 1], [10, 30]], "levels": [{"threshold": 1.0}]}
    subject.calibration = calibration
    subject.expected = {
        "image_score": np.zeros(2, np.float32),
        "score_parts": np.array([[0.5, 21], [0.5, 19]], np.float32),
    }
    row = row_of("onnxruntime", 1)
    row.outputs = {
        "image_score": np.zeros(3, np.float32),
        "score_parts": np.array([[0.5, 19], [0.5, 19], [9, 9]], np.float32),
    }
    difference = subject.differences(row)
    assert difference is not None
    assert difference.flips == 1


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


def remove_check(folder: Path) -> None:
    shutil.rmtree(folder / "check")


def damage_check(folder: Path) -> None:
    (folder / "check" / "expected.npz").write_bytes(b"nothing")


@pytest.mark.parametrize(
    "damage", [damage_record, raise_format, lack_keys, remove_check, damage_check]
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
