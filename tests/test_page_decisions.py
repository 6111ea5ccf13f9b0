"""Decisions on the report page: its text, and the table of all images."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folder import SENTENCE, TWO, decide, make_run

from anomaly_clip.errors import UserError
from anomaly_clip.files import read_csv, write_csv, write_json
from anomaly_clip.report.image_table import build_image_table
from anomaly_clip.report.page import PAGE, write_page
from anomaly_clip.results.run_files import ImageRow, read_files

THRESHOLDS = {"cap": 0.25, "nut": 3.5}
DRIFT = {"alarm": True, "largest": 31234.5, "at": None}


def text_of(run: Path) -> str:
    """Return the visible text of a run's page."""
    write_page(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    html = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def embedded(run: Path, element: str) -> Any:
    write_page(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    (content,) = re.findall(rf'id="{element}">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(content)


def numbers(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text), "<f4").tolist()


def add_unreadable(run: Path) -> Path:
    rows = [[*row.values(), ""] for row in read_csv(run / "scores.csv")]
    rows.insert(1, ["cap/lost.png", "cap", "", "", "the image cannot be decoded"])
    write_csv(run / "scores.csv", ["path", "category", "label", "image_score", "error"], rows)
    return run


# -- text ------------------------------------------------------------------------------------------


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
        ({"drift": DRIFT}, "martingale reached 3.12e+04, and the alarm is at 100"),
        ({"as_asked": False, "sentence": "5 % cannot be had with 12 images."}, "5 % cannot be had"),
        ({"kind": "cross_validation", "sentence": "Estimated by it."}, "Estimated by it."),
        ({"normal_with_marked_pixels": 1}, "1 normal image has marked pixels"),
        ({"normal_with_marked_pixels": 1200}, "1,200 normal images have marked pixels"),
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
    content["decisions"]["categories"]["nut"] |= {"sentence": "No <b>guarantee</b>.", "as_asked": False}
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
    assert cells[6:8] == ["80 %\n44.4 to 97.5 %", "–"]
    assert cells[8:18] == [
        *("scratch", "8", "10", "80 %", "44.4 to 97.5 %"),
        *("dent", "0", "0", "–", "–"),
    ]
    assert html.index("By kind of defect") < html.index("Metrics</h2>")
    assert html.index("Metrics</h2>") < html.index("All images")


@pytest.mark.parametrize(
    "damage",
    [
        {"alpha": "x"},
        {"categories": []},
        {"categories": {"cap": {}}},
        {"categories": {"cap": None}},
        {"fdr": [0.1]},
    ],
)
def test_a_damaged_section_is_an_error_of_one_line(
    tmp_path: Path, damage: dict[str, Any]
) -> None:
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    content = json.loads((run / "predict.json").read_text())
    content["decisions"] |= damage
    write_json(run / "predict.json", content)
    with pytest.raises(UserError, match=r"predict\.json: has a damaged section decisions") as error:
        write_page(run)
    assert "\n" not in str(error.value)
    content["decisions"] = None
    write_json(run / "predict.json", content)
    with pytest.raises(UserError, match="damaged section decisions"):
        write_page(run)


@pytest.mark.parametrize("name", ["threshold", "average", "guaranteed"])
def test_numbers_of_the_section_are_finite(tmp_path: Path, name: str) -> None:
    run = decide(make_run(tmp_path, {"cap": TWO["cap"]}), {"cap": 0.25}, **{name: None})
    with pytest.raises(UserError, match="damaged section decisions"):
        read_files(run)


# -- table and scores ------------------------------------------------------------------------------


def test_the_table_has_every_image(tmp_path: Path) -> None:
    run = decide(add_unreadable(make_run(tmp_path, TWO, pictures=8)), THRESHOLDS)
    listed = json.loads((run / "gallery" / "gallery.json").read_text())
    for image, path in zip(listed["pictures"], ("cap/0.png", "cap/3.png"), strict=False):
        image["path"] = path
    write_json(run / "gallery" / "gallery.json", listed)
    table = embedded(run, "rows")
    assert table["total"] == 9
    assert table["folder"] == ""
    assert table["names"][:3] == ["cap/0.png", "cap/lost.png", "cap/1.png"]
    assert table["categories"] == [0] * 5 + [1] * 4
    assert table["decisions"] == "0-0110010"
    assert numbers(table["scores"])[2:6] == pytest.approx([0.2, 0.3, 0.6, 1.0])
    assert np.isnan(numbers(table["scores"])[1])
    assert numbers(table["p_values"])[3] == pytest.approx(0.05)
    assert table["errors"] == {"1": "the image cannot be decoded"}
    html = (run / PAGE).read_text(encoding="utf-8")
    for row, name in (("0", "cap/0"), ("4", "cap/1")):
        assert re.search(rf'id="card-{table["cards"][row]}".*?{name}<', html, re.DOTALL)
    assert "labels" not in table


def test_the_table_of_a_test_has_labels_and_no_decisions(tmp_path: Path) -> None:
    table = embedded(make_run(tmp_path, TWO), "rows")
    assert table["labels"] == "00110001"
    assert "decisions" not in table
    assert "p_values" not in table


def rows_of(count: int, length: int = 1) -> list[ImageRow]:
    rng = np.random.default_rng(0)
    return [
        ImageRow(f"a/b/{'x' * length}{n}.png", "cap", None, score, float("nan"), "", "", "")
        for n, score in enumerate(rng.random(count).tolist())
    ]


def test_a_table_of_too_many_images_has_the_highest_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_clip.report.image_table.MAX_ROWS", 10)
    rows = rows_of(50)
    rows[7] = ImageRow("a/b/lost.png", "cap", None, float("nan"), float("nan"), "", "", "lost")
    table = build_image_table(rows, ["cap"], {})
    assert table is not None
    assert (table["total"], len(table["names"])) == (50, 10)
    highest = sorted((row.score for n, row in enumerate(rows) if n != 7), reverse=True)[:9]
    scores = [score for score in numbers(table["scores"]) if not np.isnan(score)]
    assert sorted(scores, reverse=True) == pytest.approx(highest)
    assert list(table["errors"].values()) == ["lost"]


def test_ten_thousand_images_take_little_room(tmp_path: Path) -> None:
    table = build_image_table(rows_of(10_000, 40), ["cap"], {})
    assert table is not None
    assert len(json.dumps(table)) < 800_000
    long = build_image_table(rows_of(10_000, 4000), ["cap"], {})
    assert long is not None
    assert 0 < len(long["names"]) < 1000
    assert long["folder"] == "a/b/"


def test_a_run_beyond_the_limit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_clip.report.image_table.MAX_ROWS", 5)
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    assert "The 5 lowest p-values of 8 images; scores.csv has all." in text_of(run)


def test_scores_that_decide_are_embedded_exactly(tmp_path: Path) -> None:
    """float32 would move the score 0.1 + 1e-12 onto the threshold."""
    scores = [0.1, 0.1 + 1e-12, 0.5]
    run = decide(make_run(tmp_path, {"cap": (scores, [0, 0, 1])}), {"cap": 0.1})
    (entry,) = embedded(run, "data")["scores"]
    assert entry["double"]
    assert entry["calibrated"] == 0.1
    assert np.frombuffer(base64.b64decode(entry["all"]), "<f8").tolist() == scores
    (entry,) = embedded(make_run(tmp_path / "b", {"cap": (scores, [0, 0, 1])}), "data")["scores"]
    assert (entry["double"], entry["calibrated"]) == (False, None)


def test_the_score_that_decides_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"cap": TWO["cap"]})
    rows = [[*row.values(), n] for n, row in enumerate(read_csv(run / "scores.csv"))]
    header = ["path", "category", "label", "image_score", "decision_score"]
    write_csv(run / "scores.csv", header, rows)
    assert [row.score for row in read_files(run).rows] == [0, 1, 2, 3]
