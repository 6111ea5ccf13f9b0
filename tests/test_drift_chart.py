"""Chart of the drift on the report page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_folder import THRESHOLDS, TWO, decide, make_run, text_of

from anomaly_clip.errors import UserError
from anomaly_clip.files import write_csv
from anomaly_clip.reporting.charts import HEIGHT, WIDTH
from anomaly_clip.reporting.drift_chart import MAX_POINTS, build_drift_chart
from anomaly_clip.reporting.page import PAGE, write_page

HEADER = ["path", "category", "online_p_value", "log10_martingale"]


def points_of(text: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_the_chart_by_hand() -> None:
    """From 1e-2 to 1e4, so that one power of ten has a sixth of the height."""
    built = build_drift_chart({"nut": [1.0, 3.0], "gone": [9.0], "cap": [-1.0]}, ["cap", "nut"])
    assert built is not None
    chart, alarm = built
    assert alarm == pytest.approx(HEIGHT / 3)
    cap, nut = chart.lines
    assert (cap.category, nut.category) == (0, 1)
    power = HEIGHT / 6
    expected = [(0, 4 * power), (WIDTH / 2, 3 * power), (WIDTH, power)]
    assert np.array(points_of(nut.points)) == pytest.approx(np.array(expected), abs=0.06)
    expected = [(0, 4 * power), (WIDTH / 2, 5 * power)]
    assert np.array(points_of(cap.points)) == pytest.approx(np.array(expected), abs=0.06)
    assert [label for _, label in chart.y_ticks] == ["1e-2", "1", "1e2", "1e4"]
    assert [label for _, label in chart.x_ticks] == ["0", "1", "2"]


def test_peaks_stay_in_a_long_line() -> None:
    values = [0.0] * 10_000
    values[7777] = 5.5
    built = build_drift_chart({"cap": values}, ["cap"])
    assert built is not None
    points = points_of(built[0].lines[0].points)
    assert len(points) <= MAX_POINTS + 1
    peak = min(points, key=lambda point: point[1])
    assert peak == pytest.approx((7778 / 10_000 * WIDTH, 0.5 / 8 * HEIGHT), abs=0.06)


def test_without_values_there_is_no_chart() -> None:
    assert build_drift_chart({}, ["cap"]) is None
    assert build_drift_chart({"cap": []}, ["cap"]) is None


def test_the_page_shows_drift(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    assert "drift.csv has all values" not in text_of(run)
    rows = [["a.png", "cap", 0.5, 0.1], ["b.png", "nut", 0.5, 2.5]]
    write_csv(run / "drift.csv", HEADER, rows)
    assert "drift.csv has all values" in text_of(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    assert html.count("<polyline") == 2
    assert 'class="alarm"' in html
    (run / "drift.csv").write_text("path,category\na,cap\n")
    with pytest.raises(UserError, match=r"drift\.csv: damaged"):
        write_page(run)
