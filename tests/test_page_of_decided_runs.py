"""Pages of calibrated runs of the real command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folder import embedded, folders_on, text_of
from test_decisions_runs import Planks

from anomaly_clip.cli import main
from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.files import read_csv
from anomaly_clip.reporting.page import PAGE


@pytest.fixture(scope="module")
def planks(tmp_path_factory: pytest.TempPathFactory) -> Planks:
    return Planks(tmp_path_factory.mktemp("planks"))


def gallery_of(run: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]]
    listed = json.loads((run / "gallery" / "gallery.json").read_text())["pictures"]
    return listed


def test_the_gallery_of_a_predict_shows_decisions(planks: Planks, tmp_path: Path) -> None:
    low = CategoryCalibration(tuple(planks.scores), map_threshold=0.0)
    file = planks.write("low.json", categories={"planks": low})
    contours = {}
    for name, calibration in (("high", planks.file), ("low", file)):
        run = tmp_path / name
        assert planks.run("predict", run, file=calibration) == 0
        listed = gallery_of(run)
        rows = {row["path"]: row for row in read_csv(run / "scores.csv")}
        assert {image["path"] for image in listed} == set(rows)
        for image in listed:
            row = rows[image["path"]]
            assert image["decision"] == row["decision"]
            assert image["p_value"] == float(row["p_value"])
            expected = {"anomalous"} if image["decision"] == "anomalous" else {"closest", "marked"}
            assert image["kind"] in expected
            assert image["contour"]
            with Image.open(run / "gallery" / image["picture"]) as sheet:
                # 40 x 56 pixels: not made square; without marked pixels, there is no heat map.
                assert sheet.size == ((192 * 3 + 8, 137) if image["heat"] else (192, 137))
        anomalous = [image["score"] for image in listed if image["kind"] == "anomalous"]
        assert anomalous == sorted(anomalous, reverse=True)
        contours[name] = {image["kind"] for image in listed}
        count = sum(row["decision"] == "anomalous" for row in rows.values())
        assert f"{count} of 7 images are called anomalous" in text_of(run)
        assert folders_on(run / PAGE, tmp_path, planks.file.parent) == []
        table = embedded(run, "rows")
        assert (len(table["cards"]), table["drawings"]) == (7, {})
        drawings = json.loads((run / "gallery" / "gallery.json").read_text())["drawings"]
        assert [path for path, _ in drawings] == list(rows)
        assert all((run / "maps" / f"{name}.png").is_file() for _, name in drawings)
        assert "drift.csv has all values" in text_of(run)
    assert contours == {"high": {"anomalous", "closest"}, "low": {"anomalous", "marked"}}


def test_the_page_of_a_test_has_rates_at_the_threshold(planks: Planks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert planks.run("test", run) == 0
    text = text_of(run)
    assert folders_on(run / PAGE, tmp_path, planks.file.parent) == []
    content = json.loads((run / "metrics.json").read_text())
    recall = content["decisions"]["categories"]["images"]["recall"]
    assert f"recall ({recall['count']} of {recall['total']})" in text
    assert "Recall by kind of defect" in text
    assert {image["kind"] for image in gallery_of(run)} == {"false_alarm", "miss", "hit"}
    cards = re.findall(r'data-decision="(\w+)"', (run / PAGE).read_text(encoding="utf-8"))
    assert cards.count("anomalous") == content["decisions"]["categories"]["images"]["num_anomalous"]


def test_the_page_is_made_again_from_the_folder(planks: Planks, tmp_path: Path) -> None:
    assert planks.run("predict", tmp_path / "run") == 0
    page = tmp_path / "run" / PAGE
    before = page.read_bytes()
    page.unlink()
    assert main(["report", str(tmp_path / "run"), "--page"]) == 0
    assert page.read_bytes() == before
