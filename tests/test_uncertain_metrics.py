"""Pixel metrics with wide bounds are marked wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import report
from run_folder import make_run

from anomaly_clip.files import write_json
from anomaly_clip.metrics.evaluator import uncertain_metrics, with_means
from anomaly_clip.report.page import write_page
from anomaly_clip.results.metrics_file import merge_metrics, write_metrics

SCORES = {"cap": ([0.1, 0.9], [0, 1]), "nut": ([0.2, 0.8], [0, 1])}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run whose pixel AP of one category is uncertain by 0.4."""
    folder = make_run(tmp_path / "run", SCORES)
    content = json.loads((folder / "metrics.json").read_text())
    for name, half in (("cap", 0.4), ("mean", 0.2), ("nut", 0.0005)):
        content["intervals"][name] = {"pixel_ap": [0.5 - half, 0.5 + half]}
    write_json(folder / "metrics.json", content)
    return folder


def test_on_the_page(run: Path) -> None:
    page = write_page(run).read_text(encoding="utf-8")
    assert page.count("<td>~50.0</td>") + page.count(">~50.0<") >= 2
    assert "~ MARKS PIXEL METRICS THAT MAY DIFFER" in page
    plain = write_page(make_run(run.parent / "plain", SCORES)).read_text(encoding="utf-8")
    assert "~50.0" not in plain
    assert "~ MARKS" not in plain


def test_in_a_table_of_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(run) == 0
    printed = capsys.readouterr().out
    assert printed.count("~50.0") == 2  # the category and the mean
    assert "~ MARKS PIXEL METRICS" in printed


def test_in_the_file_and_in_merged_files(tmp_path: Path) -> None:
    bounds = {"cap": {"pixel_ap": (0.49, 0.6)}}
    results = with_means({"cap": {"image_auroc": 1.0, "pixel_ap": 0.5}}, bounds)
    run: dict[str, Any] = {
        "method": "SDP",
        "weights": {"backbone": "tiny", "pretrained": "w.pt", "random": False, "sha256": None},
        "protocol": {"complete": True, "images": {"cap": 2}, "anomalous": {"cap": 1}, "words": {}},
        "checkpoint": None,
    }
    write_metrics(tmp_path, results, run)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["run"]["uncertain"] == {"cap": ["pixel_ap"], "mean": ["pixel_ap"]}
    assert "uncertain" not in run
    merged, record = merge_metrics({"cap": content}, {})
    assert "uncertain" not in record  # found again when the merged file is written
    assert uncertain_metrics(merged) == content["run"]["uncertain"]


@pytest.mark.parametrize(
    "intervals", [3, {"cap": 3}, {"cap": {"pixel_ap": [0.1]}}, {"cap": {"pixel_ap": ["a", "b"]}}]
)
def test_damaged_bounds_are_an_error_of_one_line(
    run: Path, intervals: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "metrics.json").read_text())
    write_json(run / "metrics.json", {**content, "intervals": intervals})
    assert report(run) == 2
    assert "metrics.json" in capsys.readouterr().err
