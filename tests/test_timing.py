"""Rows of a benchmark: processes that take turns, failures, signals, and the choice."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_programs import images, program, row_of, write_program

from anomaly_clip.exporting import timing
from anomaly_clip.exporting.parity import Difference
from anomaly_clip.exporting.timed_process import peak_memory
from anomaly_clip.exporting.timing import Program, Timing, choose, measure


def test_each_row_is_measured_in_a_process_without_torch(tmp_path: Path) -> None:
    file = write_program(tmp_path / "a.onnx")
    rows = measure([program(file)], [1, 3], images(), threads=1, seconds=0.01, rounds=2)
    assert [row.name for row in rows] == ["onnxruntime, batch 1", "onnxruntime, batch 3"]
    expected = images().mean(axis=1, dtype=np.float32)
    for row in rows:
        assert row.error is None
        assert len(row.times) == len(row.processor) >= 2
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

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupted(rows: Sequence[Timing], title: str) -> Iterable[Timing]:
        yield rows[0]
        raise KeyboardInterrupt

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    file = write_program(tmp_path / "a.onnx")
    with pytest.raises(KeyboardInterrupt):
        measure([program(file)], [1, 2], images(), threads=1, seconds=1, watch=interrupted)
    assert [process.returncode is None for process in started] == [False]
    assert list(scratch.iterdir()) == []


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
