"""Comparison of runs in one table."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_helpers import MVTEC, Writer, compared, lines_of, metrics, report, rows_of, run_writer

from anomaly_clip.reporting.comparison import compare_runs
from anomaly_clip.results.run_reader import find_runs


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def test_a_mean_over_a_failed_category_is_refused(write: Writer) -> None:
    some = {"a": metrics(0.9), "b": metrics(0.8)}
    folder = write(categories=some, failed={"c": "no image"}, data="Demo", complete=False)
    comparison = compare_runs(find_runs([folder]))
    assert [line.cells[1] for line in comparison.table.lines] == [
        "90.0",
        "80.0",
        "failed",
        "incomplete\n(2 of 3)",
    ]
    mean = comparison.data.rows[-1]
    assert mean[0] == "mean"
    assert mean[6] is None
    assert "image_auroc incomplete (2 of 3)" in str(mean[-1])


def test_categories_without_anomalous_images_have_dashes(write: Writer) -> None:
    undefined = {"a": metrics(None, None), "b": metrics(None, None)}
    table = compare_runs(find_runs([write(categories=undefined, data="Demo")])).table
    assert all(set(line.cells[1:]) == {"–"} for line in table.lines)
    partial = {"a": metrics(0.7), "b": metrics(None)}
    table = compare_runs(find_runs([write("partial", categories=partial, data="Demo")])).table
    assert table.lines[-1].cells[1] == "incomplete\n(1 of 2)"
    assert table.lines[-1].cells[3] == "50.0"
    published = compared("tab1", write("c", categories={c: metrics(None) for c in MVTEC}))
    assert lines_of(published, "PaDiM, ImageNet")[1].cells[2:] == ("–", "–", "–")


def test_runs_stand_side_by_side(
    write: Writer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    some = {"a": metrics(0.9, 0.8), "b": metrics(0.7, 0.6)}
    others = {"a": metrics(0.5), "b": metrics(0.5)}
    write("several/one", some, data="Demo")
    write("several/two", others, data="Demo", weights="random")
    assert report(tmp_path / "several", "--csv", tmp_path / "x" / "a.csv") == 0
    out = capsys.readouterr().out
    assert "PaDiM on Demo: 2 categories, percent" in out
    assert "B: RANDOM WEIGHTS: these metrics are meaningless" in out
    mean = next(line for line in out.splitlines() if line.strip().startswith("mean"))
    assert mean.split() == ["mean", "80.0", "50.0", "70.0", "50.0"]
    rows = rows_of(tmp_path / "x" / "a.csv")
    assert [(row["category"], row["image_auroc"]) for row in rows] == [
        ("a", "0.9"),
        ("a", "0.5"),
        ("b", "0.7"),
        ("b", "0.5"),
        ("mean", str((0.9 + 0.7) / 2)),
        ("mean", "0.5"),
    ]
