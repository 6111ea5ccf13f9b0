"""Sweep files: the options of each run, and the arguments of its command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sweep_files import write_sweep

from anomaly_clip.commands.sweep_file import ARGS, read_sweep


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_sweep, tmp_path)


def test_a_grid_has_all_combinations_in_order(write: Callable[..., Path]) -> None:
    parameters = {"a": {"values": [1, 2]}, "b": {"value": "x"}, "c": {"values": [[3, 6], [4]]}}
    file = write(parameters=parameters, run_cap=3)
    rows = [(1, "x", [3, 6]), (1, "x", [4]), (2, "x", [3, 6])]
    sweep = read_sweep(file)
    assert [tuple(run.values()) for run in sweep.runs("grid", None, 0)] == rows
    assert len(sweep.runs("grid", 2, 0)) == 2
    assert len(sweep.runs("grid", 9, 0)) == 3
    fewer, more = sweep.runs("random", 1, 5), sweep.runs("random", 3, 5)
    assert fewer == more[:1]
    assert more != sweep.runs("random", 3, 6)


@pytest.mark.parametrize(
    "start",
    [
        ["${env}", "anomaly_clip"],
        ["${env}", "${program}"],
        ["${env}", "${interpreter}", "-m", "anomaly_clip"],
        ["/opt/bin/anomaly_clip"],
    ],
)
def test_a_command_may_begin_as_wandb_allows(
    start: list[str], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGES", "/data")
    command = [*start, "fit", "--data.root=${envvar:IMAGES}/visa", ARGS, "--trainer.devices", 1]
    sweep = read_sweep(write(command=command))
    words = ["--data.root=/data/visa", "--x", "1", "--a=[3, 6]", "--b=True", "--c=1e-05"]
    swept = {"a": [3, 6], "b": True, "c": 1e-5}
    assert sweep.words(swept, ["--x", "1"]) == [*words, "--trainer.devices", "1"]
