"""Metrics of the page: intervals, and kinds of defect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_folder import THRESHOLDS, TWO, decide, make_run, text_of

from anomaly_clip.files import read_csv, write_csv, write_json
from anomaly_clip.metrics import auroc
from anomaly_clip.metrics.intervals import auroc_interval, mean_interval
from anomaly_clip.reporting.metrics_view import MetricsView, interval_text
from anomaly_clip.results.run_files import read_files

KINDS = {
    "cap": ([0.1, 0.2, 0.3, 0.6, 0.15], [0, 0, 1, 1, 1]),
    "nut": ([1.0, 2.0, 4.0, 3.0, 3.5], [0, 0, 0, 1, 1]),
}


def view(run: Path) -> MetricsView:
    files = read_files(run)
    return MetricsView(files, list(files.metrics))


def with_kinds(run: Path, kinds: list[str]) -> Path:
    rows = list(read_csv(run / "scores.csv"))
    table = [
        [*row.values(), kind if row["label"] == "1" else ""]
        for row, kind in zip(rows, kinds, strict=True)
    ]
    write_csv(run / "scores.csv", [*rows[0], "defect"], table)
    return run


def test_image_auroc_has_an_interval_by_category_and_of_the_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO)
    shown = view(run)
    ends = [auroc_interval(0.875, 2, 2), auroc_interval(0.875, 3, 1)]
    assert list(shown.intervals.values()) == ends
    assert shown.rows[0].cells[0] == ("87.5", interval_text(ends[0]))
    assert shown.rows[0].cells[1] == ("50.0", "")
    mean = interval_text(mean_interval([0.875] * 2, ends))
    assert shown.summary[0] == ("image AUROC", "87.5", mean)
    text = text_of(run)
    assert f"the metrics are uncertain; the 95 % interval of image AUROC is {mean}" in text
    assert "score method of Newcombe (2006)" in text


def test_intervals_of_a_transductive_method_are_rough(tmp_path: Path) -> None:
    """Its scores depend on each other, and the formula is for independent ones."""
    run = make_run(tmp_path, TWO)
    assert "transductive" not in view(run).method
    assert '"transductive": false' in (text_of(run) + (run / "report.html").read_text())
    content = json.loads((run / "metrics.json").read_text())
    content["run"]["protocol"]["transductive"] = True
    write_json(run / "metrics.json", content)
    assert view(run).method.endswith(
        "Scores of a transductive method depend on each other, so that these are rough."
    )
    text_of(run)
    assert '"transductive": true' in (run / "report.html").read_text()


def test_there_is_no_interval_without_both_classes_or_of_several_rounds(tmp_path: Path) -> None:
    run = make_run(tmp_path, {**TWO, "good": ([0.1], [0])})
    shown = view(run)
    assert set(shown.intervals) == {"cap", "nut"}
    assert shown.mean_interval is None  # the mean contains a category without one
    content = json.loads((run / "metrics.json").read_text())
    content["run"]["protocol"]["rounds"] = 10
    write_json(run / "metrics.json", content)
    shown = view(run)
    assert (shown.intervals, shown.mean_interval, shown.method) == ({}, None, "")


def test_an_interval_by_bootstrap_is_shown_where_there_is_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"cap": TWO["cap"]})
    content = json.loads((run / "metrics.json").read_text())
    content["intervals"] = {"cap": {"image_auroc_bootstrap": [0.25, 0.9]}}
    write_json(run / "metrics.json", content)
    shown = view(run)
    assert shown.intervals == {"cap": (0.25, 0.9)}
    assert "bootstrap of the images" in shown.method


def test_kinds_of_defect(tmp_path: Path) -> None:
    kinds = ["", "", "cut", "dent", "cut", "", "", "", "cut", "dent"]
    run = with_kinds(make_run(tmp_path, KINDS), kinds)
    rows = view(run).kinds
    assert [row.category for row in rows] == [-1, -1, 0, 0, 1, 1]
    cut = auroc(torch.tensor([0.1, 0.2, 0.3, 0.15]), torch.tensor([False, False, True, True]))
    interval = auroc_interval(cut, 2, 2)
    ends = interval_text(interval)
    # The highest F1 of the cap is at 0.15: three hits and one false alarm.
    assert rows[2].cells == ["cap", "cut", "2", f"{100 * cut:.1f}", ends, "100.0"]
    assert rows[5].cells[:4] == ["nut", "dent", "1", "66.7"]
    nut = (2 / 3, auroc_interval(2 / 3, 3, 1))
    mean = [f"{50 * (cut + nut[0]):.1f}"]
    mean += [interval_text(mean_interval([cut, nut[0]], [interval, nut[1]])), "–"]
    assert rows[0].cells == ["mean of 2 categories", "cut", "3", *mean]
    text = text_of(run)
    assert "Image AUROC by kind of defect" in text
    assert "which is too optimistic for new images" in text
    decided = decide(run, THRESHOLDS, predict=False)
    assert len(view(decided).kinds[0].cells) == 5  # the decisions have the recall


@pytest.mark.parametrize("kinds", [["cut"] * 8, None])
def test_a_single_kind_has_no_table(tmp_path: Path, kinds: list[str] | None) -> None:
    run = make_run(tmp_path, TWO)
    if kinds is not None:
        with_kinds(run, kinds)
    assert view(run).kinds == []
    assert "by kind of defect" not in text_of(run)


def test_metrics_of_the_images_and_not_of_the_decisions(tmp_path: Path) -> None:
    run = with_kinds(
        make_run(tmp_path, KINDS), ["", "", "cut", "dent", "cut"] + [""] * 3 + ["a"] * 2
    )
    rows = list(read_csv(run / "scores.csv"))
    table = [[*row.values(), 5.0 if row["label"] == "0" else 0.5] for row in rows]
    write_csv(run / "scores.csv", [*rows[0], "decision_score"], table)
    assert view(run).kinds[1].cells[3] == "100.0"  # dents of the cap, by image_score
