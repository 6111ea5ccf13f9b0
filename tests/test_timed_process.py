"""The process that runs a single program: its answers, timing, and reasons of failures."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_programs import images

from anomaly_clip.exporting.timed_process import answer, peak_memory


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
    assert len(short["times"]) == len(short["processor"]) == 1
    assert len(longer["times"]) == len(longer["processor"]) > 1
    assert sum(longer["processor"]) > 0
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
