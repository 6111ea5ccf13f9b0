"""Images of the page: legend, panels, margins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from run_folder import THRESHOLDS, TWO, decide, make_run, text_of

from anomaly_clip.files import write_json
from anomaly_clip.reporting.gallery_view import build_gallery, embed_image
from anomaly_clip.reporting.page import PAGE
from anomaly_clip.results.run_files import read_files


def with_entries(run: Path, **values: Any) -> Path:
    """Change the gallery's entries; a list has a value per entry."""
    file = run / "gallery" / "gallery.json"
    listed = json.loads(file.read_text())
    for number, entry in enumerate(listed["pictures"]):
        entry |= {k: v[number] if isinstance(v, list) else v for k, v in values.items()}
    write_json(file, listed)
    return run


def draw_sheets(run: Path, num_panels: int, panel: tuple[int, int] = (40, 20)) -> None:
    width = num_panels * panel[0] + 4 * (num_panels - 1)
    for file in (run / "gallery").glob("*.webp"):
        Image.fromarray(np.zeros((panel[1], width, 3), np.uint8)).save(file)


def test_margins_explain_the_order(tmp_path: Path) -> None:
    kinds = [["false_alarm", "false_alarm", "miss", "miss"], ["anomalous"] * 2 + ["closest"] * 2]
    gaps: list[float] = [0.1, -0.2, 0.3, -0.05]
    run = with_entries(make_run(tmp_path, TWO, pictures=4), kind=kinds[0], gap=gaps)
    view = build_gallery(read_files(run), ["cap", "nut"], 10**6)
    assert [image["margin"] for image in view.images["false_alarm"]] == ["+10.0 %", "-20.0 %"]
    assert [image["margin"] for image in view.images["miss"]] == ["-30.0 %", "+5.0 %"]
    assert view.margins == "the threshold with the highest F1"
    decide(with_entries(run, kind=kinds[1]), THRESHOLDS)
    view = build_gallery(read_files(run), ["cap", "nut"], 10**6)
    assert [image["margin"] for image in view.images["anomalous"]] == ["+10.0 %", "-20.0 %"]
    assert view.margins == "the calibrated threshold"
    assert "distance of the score from the calibrated threshold" in text_of(run)


def test_a_category_of_one_class_has_margins_from_its_highest_score(tmp_path: Path) -> None:
    scores = {"cap": TWO["cap"], "nut": ([1.0, 3.0], [0, 0])}
    view = build_gallery(read_files(make_run(tmp_path, scores, pictures=6)), ["cap", "nut"], 10**6)
    assert all(image["margin"] for images in view.images.values() for image in images)
    assert view.margins == (
        "the threshold with the highest F1 or the highest score (there is no threshold)"
    )


@pytest.mark.parametrize("kind", ["high", "usual"])
def test_images_in_the_order_of_scores_have_no_margins(kind: str, tmp_path: Path) -> None:
    run = with_entries(make_run(tmp_path, TWO, pictures=2), kind=kind)
    view = build_gallery(read_files(run), ["cap", "nut"], 10**6)
    assert view.images[kind][0]["margin"] is None
    assert view.margins == ""
    assert "Margin:" not in text_of(run)


def test_the_legend_stands_above_the_images(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO, pictures=8)
    draw_sheets(run, 4)
    scales = [[0.1, 0.9]] * 4 + [[3, 12345.6]] * 4
    with_entries(run, overlay=True, mask=True, panel=[(40, 20)] * 8, scale=scales)
    text = text_of(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    assert html.index('class="image-legend"') < html.index('<figure class="card"')
    assert "Left: image. Right: heat map on the image." in text
    assert "cap: 0.1 to 0.9 nut: 3 to 12346" in text
    assert "outline of the mask (ground truth)" in text
    assert "map threshold" not in text
    assert "--front: 4.2; --all: 8.6" in html
    view = build_gallery(read_files(run), ["cap"], 10**6)
    assert [entry[0] for entry in view.ranges] == [-1, 0]  # a category that the page does not list
    with_entries(run, contour=True, scale=[[0.1, 0.9]] * 8, category="cap")
    text = text_of(run)
    assert "left out if no pixel is above the map threshold" in text
    assert "contour at the map threshold" in text
    assert "Colour scale: 0.1 to 0.9" in text


def test_an_image_without_a_heat_map_is_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO, pictures=2)
    draw_sheets(run, 1)
    with_entries(run, overlay=False, heat=False, mask=False, panel=[(40, 20)] * 2)
    view = build_gallery(read_files(run), ["cap", "nut"], 10**6)
    [image, _] = view.images["false_alarm"]
    assert image["shape"] == (2.0, 2.0, True)
    assert not view.ranges
    assert not view.has_panels


def test_galleries_of_earlier_versions_keep_their_legend(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO, pictures=8)
    text = text_of(run)
    assert "From left to right: image, heat map (one colour scale per category), mask" in text
    assert 'class="sheet' not in (run / PAGE).read_text(encoding="utf-8")
    assert embed_image(run / "gallery" / "0.webp").startswith("data:image/webp;base64,UklGR")
