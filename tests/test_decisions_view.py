"""Decisions at the beginning of the report page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folder import SENTENCE, THRESHOLDS, TWO, decide, embedded, make_run, text_of

from anomaly_clip.files import write_json
from anomaly_clip.reporting.decisions_view import build_view, number_text
from anomaly_clip.reporting.page import PAGE
from anomaly_clip.results.run_files import read_files

DRIFT = {"alarm": True, "largest": 31234.5, "at": None}


def test_a_calibrated_predict_begins_with_its_decisions(tmp_path: Path) -> None:
    text = text_of(decide(make_run(tmp_path, {"cap": TWO["cap"]}, pictures=2), {"cap": 0.25}))
    places = [
        text.index(part)
        for part in (
            "2 of 4 images are called anomalous",
            SENTENCE,
            "An image is anomalous if its score is above 0.25.",
            "All images",
            "From left to right",
            "Scores and threshold",
            "Protocol",
        )
    ]
    assert places == sorted(places)
    assert "No decisions" not in text


def test_without_a_calibration_a_line_says_how_to_get_decisions(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, {"cap": TWO["cap"]}), {"cap": 0.25})
    content = json.loads((run / "predict.json").read_text())
    del content["decisions"]
    for checkpoint, option in (("last.ckpt", "--ckpt_path"), (None, "--config")):
        content["run"]["checkpoint"] = checkpoint
        write_json(run / "predict.json", content)
        text = text_of(run)
        assert f"anomaly_clip calibrate {option}" in text
        assert "called anomalous" not in text
        assert "No decisions" in text
    assert "No decisions" not in text_of(make_run(tmp_path / "test", TWO))  # has labels


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"drift": DRIFT}, "martingale reached 31234, and the alarm is at 100"),
        ({"as_asked": False, "sentence": "5 % cannot be had with 12 images."}, "5 % cannot be had"),
        ({"kind": "cross_validation", "sentence": "Estimated by it."}, "Estimated by it."),
        ({"normal_with_marked_pixels": 1}, "1 image called normal has marked pixels"),
        ({"normal_with_marked_pixels": 1200}, "1,200 images called normal have marked pixels"),
    ],
)
def test_what_limits_the_guarantee_is_on_top(
    tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    run = decide(make_run(tmp_path, {"cap": TWO["cap"]}), {"cap": 0.25}, **entry)
    text = text_of(run)
    assert text.index(words) < text.index("All images")
    is_warning = f'<p class="note">{words[:12]}' in (run / PAGE).read_text(encoding="utf-8")
    assert is_warning == ("sentence" in entry)


def test_the_false_discovery_rate_is_named(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    content = json.loads((run / "predict.json").read_text())
    content["decisions"]["fdr"] = 0.1
    write_json(run / "predict.json", content)
    assert "at most 10 % are expected to be normal" in text_of(run)
    assert embedded(run, "data")["fdr"] == 0.1


def test_categories_have_a_table_and_share_sentences(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    text = text_of(run)
    assert "3 of 8 images are called anomalous" in text
    assert text.count(SENTENCE) == 1
    html = (run / PAGE).read_text(encoding="utf-8")
    cells = re.findall(r"<td>([^<]*)</td>", html)
    assert cells[:7] == ["cap", "2", "4", "0.25", "5 %", "14.6 %", "19"]
    assert cells[7:11] == ["nut", "1", "4", "3.5"]
    content = json.loads((run / "predict.json").read_text())
    content["decisions"]["categories"]["nut"] |= {
        "sentence": "No <b>guarantee</b>.",
        "as_asked": False,
    }
    write_json(run / "predict.json", content)
    text = text_of(run)
    assert f"cap: {SENTENCE}" in text
    assert "nut: No &lt;b&gt;guarantee&lt;/b&gt;." in text


def test_a_test_has_recall_and_false_alarms_with_intervals(tmp_path: Path) -> None:
    share = {"count": 8, "total": 10, "value": 0.8, "low": 0.444, "high": 0.975}
    empty = {"count": 0, "total": 0, "value": None, "low": None, "high": None}
    run = decide(
        make_run(tmp_path, {"cap": TWO["cap"]}),
        {"cap": 0.25},
        predict=False,
        recall=share,
        false_alarms=None,
        kinds={"scratch": share, "dent": empty},
    )
    text_of(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    cells = re.findall(r"<td>([^<]*)</td>", html)
    assert cells[:5] == ["scratch", "8", "10", "80 %", "44.4 to 97.5 %"]
    assert cells[5:10] == ["dent", "0", "0", "–", "–"]
    assert "<b>80 %</b><span>recall (8 of 10)<br>95 % interval: 44.4 to 97.5 %</span>" in html
    assert "false alarms (" not in html
    assert html.index("Recall by kind of defect") < html.index("Metrics</h2>")
    assert html.index("Metrics</h2>") < html.index("All images")


def test_a_test_of_categories_has_a_table_of_rates(tmp_path: Path) -> None:
    share = {"count": 8, "total": 10, "value": 0.8, "low": 0.444, "high": 0.975}
    rates = {"recall": share, "false_alarms": None, "kinds": {}}
    run = decide(make_run(tmp_path, TWO), THRESHOLDS, predict=False, **rates)
    content = json.loads((run / "metrics.json").read_text())
    content["decisions"] |= {"confidence": 0.99, "source": {"cap": "a.ckpt", "nut": "b.ckpt"}}
    write_json(run / "metrics.json", content)
    text = text_of(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    cells = re.findall(r"<td>([^<]*)</td>", html)
    assert cells[7:10] == ["80 %\n44.4 to 97.5 %", "–", "nut"]
    assert "with 99 % confidence" in text
    assert "Calibration:" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(359.01928, "359"), (81234.5, "81234"), (-0.000123456, "-0.0001235"), (2e12, "2e+12")],
)
def test_scores_have_the_digits_that_matter(value: float, text: str) -> None:
    assert number_text(value) == text


def test_many_guarantees_are_shown_on_a_click(tmp_path: Path) -> None:
    names = [f"part {number}" for number in range(25)]
    run = decide(make_run(tmp_path, dict.fromkeys(names, TWO["cap"])), dict.fromkeys(names, 0.25))
    content = json.loads((run / "predict.json").read_text())
    for number, entry in enumerate(content["decisions"]["categories"].values()):
        entry["sentence"] = f"Guarantee {number}."
        entry["drift"] = DRIFT
    write_json(run / "predict.json", content)
    decisions = read_files(run).decisions
    assert decisions is not None
    view = build_view(decisions, is_test=False)
    assert view.is_long
    assert view.guarantees[24] == "part 24: Guarantee 24."
    (drift,) = view.warnings
    assert "of part 0, part 1" in drift
    assert "part 19 and 5 more are unlike" in drift
    assert "<details><summary>Guarantees of the categories" in html_of(run)


def html_of(run: Path) -> str:
    text_of(run)
    return (run / PAGE).read_text(encoding="utf-8")


def test_a_single_anomalous_image_is_singular(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, {"cap": ([0.1, 0.4], [0, 0])}), {"cap": 0.3})
    assert "1 of 2 images is called anomalous" in text_of(run)
