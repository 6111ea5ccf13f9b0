"""Pixel metrics with wide bounds are marked wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_helpers import MVTEC, Writer, compared, lines_of, metrics, report, rows_of, run_writer
from run_folder import make_run

from anomaly_clip.files import write_json
from anomaly_clip.metric_values import uncertain_metrics, with_means
from anomaly_clip.reporting.comparison import compare_runs
from anomaly_clip.reporting.page import write_page
from anomaly_clip.results.metrics_file import merge_metrics, write_metrics
from anomaly_clip.results.run_reader import find_runs

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


def widen(folder: Path, **bounds: tuple[float, float]) -> Path:
    """Give the pixel AUROC of some categories of a run these bounds."""
    content = json.loads((folder / "metrics.json").read_text())
    for name, pair in bounds.items():
        content["intervals"][name] = {"pixel_auroc": pair}
    write_json(folder / "metrics.json", content)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def pixel_run(write: Writer, name: str = "padim", **protocol: Any) -> Path:
    """Return a run with which Table 2 of TAB compares its means of textures and of objects."""
    return write(name, {c: metrics(0.9, 0.5) for c in MVTEC}, **protocol)


def test_in_a_published_table_only_the_uncertain_values_are_marked(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Image metrics are exact, also if pixel metrics of the same run are not.
    folder = widen(write(), cable=(0.1, 0.9))
    assert report(folder, "--table", "tab1") == 0
    printed = capsys.readouterr().out
    assert "~" not in printed
    assert "wide bounds" not in printed
    # Pixel metrics: the mean over textures contains no uncertain category.
    folder = widen(pixel_run(write, "pixels"), cable=(0.1, 0.9))
    table = compared("tab2", folder)  # textures, objects, all
    _, ours, difference = lines_of(table, "PaDiM, ImageNet")
    assert ours.cells[2:] == ("50.00", "~50.00", "~50.00")
    assert not any("wide bounds" in cell for cell in ours.cells)
    assert not any("~" in cell for cell in difference.cells)
    assert sum("~ MARKS" in note.text for note in table.notes) == 1
    files = {name: tmp_path / f"table.{name}" for name in ("csv", "html")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    assert report(folder, "--table", "tab2", *options) == 0
    assert "~ MARKS PIXEL METRICS" in capsys.readouterr().out
    assert "~ MARKS PIXEL METRICS" in files["html"].read_text()
    rows = [row for row in rows_of(files["csv"]) if row["run"] == str(folder)]
    noted = {row["of"]: "wide bounds" in row["note"] for row in rows}
    assert noted == {"textures": False, "objects": True, "all": True}


def test_a_mean_of_draws_is_marked_if_one_draw_is_uncertain(write: Writer) -> None:
    exact = pixel_run(write, "a", data_seed=0)
    wide = widen(pixel_run(write, "b", data_seed=1), carpet=(0.1, 0.9))
    lines = lines_of(compared("tab2", exact, wide), "PaDiM, ImageNet")
    cells = {line.cells[1]: line.cells[2] for line in lines}
    assert cells["ours A"] == "50.00"
    assert cells["ours B"] == "~50.00"
    assert cells["mean of 2"] == "~50.00\n±0.00"


def test_only_marks_that_are_printed_are_announced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of several runs, no pixel AP is printed; files have it.
    other = make_run(tmp_path / "other", SCORES)
    file = tmp_path / "table.md"
    assert report(run, other, "--markdown", file, "--csv", tmp_path / "table.csv") == 0
    assert "~" not in capsys.readouterr().out
    assert "MARKS PIXEL METRICS" in file.read_text()
    assert not any("wide bounds" in text for text in compare_runs(find_runs([run])).table.headings)
    notes = {(r["category"], r["run"]): r["note"] for r in rows_of(tmp_path / "table.csv")}
    assert notes["cap", str(run)].endswith("pixel_ap")
    assert "wide bounds" not in notes["nut", str(run)]
    assert "wide bounds" in notes["mean", str(run)]
    assert not notes["cap", str(other)]
    widen(run, nut=(0.1, 0.9))
    assert report(run, other) == 0
    printed = capsys.readouterr().out
    assert printed.count("~50.0") == 1
    assert printed.count("~ MARKS") == 1


def test_categories_that_are_not_printed_announce_no_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", {f"part {n}": ([0.1, 0.9], [0, 1]) for n in range(41)})
    widen(folder, **{"part 40": (0.1, 0.9)})
    file = tmp_path / "table.html"
    assert report(folder, "--html", file) == 0
    assert "~" not in capsys.readouterr().out
    assert "~ MARKS" in file.read_text()


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
