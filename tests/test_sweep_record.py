"""Record of a sweep, and its table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from anomaly_clip.commands.sweep_record import (
    FAILURE_FILE,
    RESULT_FILE,
    SweepRecord,
    last_logged,
    print_table,
    write_table,
)
from anomaly_clip.files import write_csv, write_json

OPENAI, RANDOM = ({"weights": w, "validated on": "auxiliary"} for w in ("openai", "random"))
RECORD = SweepRecord(
    title="SDPPlus on Demo",
    directory="/",
    metric="val/pixel_ap",
    maximize=True,
    several=False,
    runs=[{"model.lr": lr} for lr in (0.1, 0.01, 0.001, 1.0)],
    origins=[OPENAI, OPENAI, RANDOM, OPENAI],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the folder of a sweep: two runs finished, one failed, one not started."""
    for number, goal in ((1, 0.25), (3, 0.5)):
        metrics = {"val/pixel_ap": goal, "val/image_ap": 0.75, "val/random_weights": 1.0}
        result = {"figures": metrics, "epoch": 2, "step": 30, "minutes": 1.25}
        write_json(tmp_path / str(number) / RESULT_FILE, result)
    write_json(tmp_path / "2" / FAILURE_FILE, {"why": "no images"})
    return tmp_path


def test_the_last_value_counts_not_the_best(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    rows = [(0, 9, 0.75, None, 0.25), (1, 14, None, 0.5, None), (1, 19, 0.5, None, 0.75)]
    write_csv(file, ["epoch", "step", "val/pixel_ap", "train/loss", "val/image_ap"], rows)
    metrics, time_logged = last_logged(file, "val/pixel_ap")
    assert metrics == {
        "epoch": 1,
        "step": 19,
        "val/pixel_ap": 0.5,
        "train/loss": 0.5,
        "val/image_ap": 0.75,
    }
    assert time_logged == {"epoch": 1, "step": 19}
    assert last_logged(file, "train/loss")[1] == {"epoch": 1, "step": 14}
    assert last_logged(tmp_path / "none.csv", "val/pixel_ap") == ({}, {})


def test_the_file_has_one_row_per_run(folder: Path) -> None:
    write_table(folder, RECORD)
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "failed", "finished", "not run"]
    assert [row["val/pixel_ap"] for row in rows] == ["0.25", "", "0.5", ""]
    assert (rows[0]["val/image_ap"], rows[0]["step"], rows[0]["minutes"]) == ("0.75", "30", "1.25")
    assert (rows[1]["why"], rows[3]["folder"]) == ("no images", "")
    assert "val/random_weights" not in rows[0]


@pytest.mark.parametrize(("maximize", "order"), [(True, "3124"), (False, "1324")])
def test_the_best_runs_come_first(
    folder: Path, maximize: bool, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = SweepRecord(**{**vars(RECORD), "maximize": maximize})
    print_table(folder, record)
    out = capsys.readouterr().out
    assert f"the {'highest' if maximize else 'lowest'} val/pixel_ap first" in out
    starts = [line.split()[0] for line in out.splitlines() if line.split()]
    assert "".join(start for start in starts if start.isdecimal()) == order
    assert "run 3: RANDOM WEIGHTS" in out


def test_a_warning_about_all_runs_names_no_run() -> None:
    by_test = [{"weights": "demo", "validated on": "test"}] * 4
    record = SweepRecord(**{**vars(RECORD), "origins": by_test})
    assert [remark.partition(" ")[0] for remark in record.remarks] == ["SWEEP", "demo"]


def test_a_run_is_ranked_by_its_last_validation(tmp_path: Path) -> None:
    """Lightning's logger writes two validations with different metrics, then a training step."""
    logger = CSVLogger(tmp_path, name="", version="")
    validations = [{"val/pixel_ap": 0.9, "val/image_ap": 0.2}, {"val/pixel_ap": 0.4}]
    for epoch, validation in enumerate(validations):
        logger.log_metrics({"train/loss": 1.0 - epoch, "epoch": epoch}, step=10 * epoch + 8)
        logger.log_metrics({**validation, "epoch": epoch}, step=10 * epoch + 9)
    logger.log_metrics({"train/loss": 0.25, "epoch": 2}, step=28)
    logger.save()
    metrics, when = last_logged(tmp_path / "metrics.csv", "val/pixel_ap")
    assert metrics["val/pixel_ap"] == 0.4
    assert metrics["val/image_ap"] == 0.2  # only the first validation logs it
    assert metrics["train/loss"] == 0.25
    assert when == {"epoch": 1, "step": 19}
    assert last_logged(tmp_path / "nowhere.csv", "val/pixel_ap") == ({}, {})
