"""Table of all images on the report page, and the scores embedded in it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folder import (
    THRESHOLDS,
    TWO,
    add_unreadable,
    decide,
    embedded,
    make_run,
    numbers,
    text_of,
)

from anomaly_clip.errors import UserError
from anomaly_clip.files import read_csv, write_csv, write_json
from anomaly_clip.reporting.image_table import build_image_table
from anomaly_clip.reporting.page import PAGE, write_page
from anomaly_clip.results.run_files import ImageRow, read_files


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
    monkeypatch.setattr("anomaly_clip.reporting.image_table.MAX_ROWS", 10)
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
    monkeypatch.setattr("anomaly_clip.reporting.image_table.MAX_ROWS", 5)
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
    assert "Scores below are decision scores" in text_of(decide(run, {"cap": 0.25}, predict=False))
    other = decide(make_run(tmp_path / "other", TWO), THRESHOLDS)
    assert "Scores below are decision scores" not in text_of(other)


def test_images_outside_of_the_gallery_lead_to_their_drawings(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, {"cap": TWO["cap"]}, pictures=1), {"cap": 0.25})
    listed = json.loads((run / "gallery" / "gallery.json").read_text())
    listed["pictures"][0]["path"] = "cap/0.png"
    listed["drawings"] = [["cap/0.png", "cap/0"], ["cap/2.png", "cap/a b#2"]]
    write_json(run / "gallery" / "gallery.json", listed)
    table = embedded(run, "rows")
    assert list(table["cards"]) == ["0"]
    assert table["drawings"] == {"2": "maps/cap/a%20b%232.png"}
    assert "folder maps next to it" in text_of(run)
    listed["drawings"] = [1]
    write_json(run / "gallery" / "gallery.json", listed)
    with pytest.raises(UserError, match=r"gallery\.json: damaged"):
        write_page(run)
