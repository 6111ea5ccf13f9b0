"""Charts of curves on the report page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_folder import TWO, make_run

from anomaly_clip.metric_values import Curve
from anomaly_clip.reporting import charts
from anomaly_clip.reporting.charts import HEIGHT, WIDTH, build_charts, lowest_curves
from anomaly_clip.results.run_files import RunFiles, read_files


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return read_files(make_run(tmp_path, TWO))


def test_points_are_in_units_of_the_plot_area(files: RunFiles) -> None:
    curve = Curve([0.0, 0.15, 0.3], [0.0, 0.5, 1.0])  # ends at PRO's limit, 0.3
    (chart,) = build_charts(replace(files, curves={"nut": {"pixel_pro": curve}}), ["cap", "nut"])
    (line,) = chart.lines
    assert (line.category, line.title) == (1, "nut")  # without a value: the metric is undefined
    assert line.points == f"0.0,{HEIGHT:.1f} {WIDTH / 2:.1f},{HEIGHT / 2:.1f} {WIDTH:.1f},0.0"
    assert chart.x_ticks[-1] == (WIDTH, "30")
    assert chart.y_ticks[0] == (HEIGHT, "0")


def test_a_mean_of_rounds_is_not_the_area_under_a_curve(files: RunFiles) -> None:
    chart = build_charts(files, ["cap", "nut"])[0]
    assert [line.title for line in chart.lines] == ["cap 87.5", "nut 87.5"]
    rounds = replace(files, run={"protocol": {"rounds": 3}})
    assert [line.title for line in build_charts(rounds, ["cap", "nut"])[0].lines] == ["cap", "nut"]


def test_the_lowest_curves_are_kept_and_undefined_metrics_come_last(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "MAX_LINES", 2)
    curve = Curve([0.0, 1.0], [0.0, 1.0])
    metrics = {"a": 0.9, "b": None, "c": 0.2, "d": 0.5}
    many = replace(
        files,
        curves={name: {"image_roc": curve} for name in metrics},
        metrics={name: {"image_auroc": value} for name, value in metrics.items()},
    )
    assert list(lowest_curves(many, "image_roc")) == ["c", "d"]
    assert lowest_curves(many, "pixel_pr") == {}
