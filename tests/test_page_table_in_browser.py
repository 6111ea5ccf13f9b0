"""Table of all images, and decisions, on the report page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import browser, open_page
from run_folder import THRESHOLDS, TWO, add_unreadable, decide, make_run
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from test_page_in_browser import complaints, counts, move

from anomaly_clip.files import write_json
from anomaly_clip.reporting.page import write_page


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


def column(chrome: Chrome, key: str) -> list[str]:
    cells = chrome.find_elements(By.CSS_SELECTOR, f"#image-table tbody td[data-key={key}]")
    return [cell.text for cell in cells]


def press(chrome: Chrome, key: str) -> str | None:
    """Sort by a column with the keyboard; return the order that is announced."""
    button = chrome.find_element(By.CSS_SELECTOR, f"#image-table thead [data-key={key}]")
    button.send_keys(Keys.ENTER)
    return button.find_element(By.XPATH, "..").get_attribute("aria-sort")


def status(chrome: Chrome) -> str:
    return chrome.find_element(By.ID, "num-rows").text


def decided_run(folder: Path) -> Path:
    """Return a predict with an unreadable image, whose gallery shows three images."""
    run = decide(add_unreadable(make_run(folder, TWO, pictures=3)), THRESHOLDS)
    listed = json.loads((run / "gallery" / "gallery.json").read_text())
    for number, image in enumerate(listed["pictures"]):
        image |= {"path": f"cap/{number}.png", "label": None, "kind": "closest"}
    write_json(run / "gallery" / "gallery.json", listed)
    return run


def test_every_column_sorts_both_ways(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(decided_run(tmp_path)))
    # At first by p-value, as the scores of two categories are not comparable.
    assert column(chrome, "p_values") == ["0.05"] * 3 + ["0.15", "0.25", "0.6", "1", "1"]
    assert column(chrome, "names")[:4] == ["nut/2.png", "cap/3.png", "cap/2.png", "cap/1.png"]
    assert press(chrome, "scores") == "descending"
    scores = [4.0, 3.0, 2.0, 1.0, 0.6, 0.3, 0.2, 0.1]
    assert [float(text) for text in column(chrome, "scores")[:8]] == scores
    assert column(chrome, "scores")[8] == "the image cannot be decoded"  # always last
    assert press(chrome, "scores") == "ascending"
    assert [float(text) for text in column(chrome, "scores")[:8]] == scores[::-1]
    assert column(chrome, "scores")[8] == "the image cannot be decoded"
    assert press(chrome, "names") == "ascending"
    assert column(chrome, "names")[:5] == [*(f"cap/{n}.png" for n in range(4)), "cap/lost.png"]
    assert press(chrome, "names") == "descending"
    assert column(chrome, "names")[0] == "nut/3.png"
    assert press(chrome, "decisions") == "descending"
    assert column(chrome, "decisions") == ["anomalous"] * 3 + ["normal"] * 5 + ["–"]
    assert press(chrome, "categories") == "ascending"
    assert column(chrome, "categories") == ["cap"] * 5 + ["nut"] * 4
    heads = chrome.find_elements(By.CSS_SELECTOR, "#image-table thead th[aria-sort]")
    assert len(heads) == 1
    assert complaints(chrome) == []


def test_the_table_filters(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(decided_run(tmp_path)))
    assert status(chrome) == "9 of 9 shown; 1 unreadable"
    only = chrome.find_element(By.ID, "only-anomalous")
    only.send_keys(Keys.SPACE)
    assert column(chrome, "names") == ["nut/2.png", "cap/3.png", "cap/2.png"]
    assert status(chrome) == "3 of 3 shown; 1 unreadable"
    Select(chrome.find_element(By.ID, "category")).select_by_visible_text("nut")
    assert column(chrome, "names") == ["nut/2.png"]
    only.click()
    assert len(column(chrome, "names")) == 4
    chrome.find_element(By.ID, "name-filter").send_keys("T/3")
    assert column(chrome, "names") == ["nut/3.png"]
    assert status(chrome) == "1 of 1 shown"
    assert complaints(chrome) == []


def test_a_row_shows_its_image(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(decided_run(tmp_path)))
    rows = chrome.find_elements(By.CSS_SELECTOR, "#image-table tbody tr[data-card]")
    assert len(rows) == 3
    press(chrome, "names")
    button = chrome.find_element(By.CSS_SELECTOR, "#image-table tbody button")
    assert (button.text, button.get_attribute("aria-expanded")) == ("cap/0.png", "false")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    detail = chrome.find_element(By.CSS_SELECTOR, "#image-table .detail")
    assert detail.text.startswith("cap/0\n")
    assert detail.find_element(By.TAG_NAME, "img").get_attribute("alt") == "cap/0"
    button.send_keys(Keys.ENTER)
    assert not chrome.find_elements(By.CSS_SELECTOR, "#image-table .detail")
    chrome.find_element(By.CSS_SELECTOR, "tr[data-card] td[data-key=scores]").click()
    assert chrome.find_elements(By.CSS_SELECTOR, "#image-table .detail")
    assert complaints(chrome) == []


def test_long_names_of_categories_leave_room_for_the_images(tmp_path: Path, chrome: Chrome) -> None:
    long = "a_very_long_name_" * 8
    run = make_run(tmp_path, {long: TWO["cap"], "nut": TWO["nut"]})
    open_page(chrome, write_page(decide(run, {long: 0.25, "nut": 3.5})))
    cells = [
        chrome.find_element(By.CSS_SELECTOR, f"#image-table tbody td[data-key={key}]")
        for key in ("names", "categories")
    ]
    assert cells[0].size["width"] > 200
    assert cells[1].size["width"] < 400


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_table_of_many_images_fits(tmp_path: Path, chrome: Chrome, width: int) -> None:
    scores = np.random.default_rng(0).random(10_000).round(5).tolist()
    name = "a_very_long_name_" * 8
    run = decide(make_run(tmp_path, {name: (scores, [0] * 10_000)}), {name: 0.99})
    for theme in ("light", "dark"):
        open_page(chrome, write_page(run), width, theme)
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    shown = column(chrome, "scores")
    assert [float(text) for text in shown] == sorted(scores, reverse=True)[:25]
    assert status(chrome) == "25 of 10,000 shown"
    chrome.find_element(By.ID, "more-rows").click()
    assert len(column(chrome, "scores")) == 225
    chrome.find_element(By.ID, "only-anomalous").click()
    number = sum(score > 0.99 for score in scores)
    assert status(chrome) == f"25 of {number} shown"
    assert complaints(chrome) == []


def test_the_slider_starts_at_the_calibrated_threshold(tmp_path: Path, chrome: Chrome) -> None:
    """The third score is the threshold itself, and not above it."""
    scores = [0.1, 0.2, 0.3, 0.6]
    run = decide(make_run(tmp_path, {"cap": (scores, [0, 0, 1, 1])}), {"cap": 0.3})
    open_page(chrome, write_page(run))
    assert counts(chrome) == ["1", "3"]
    assert chrome.find_element(By.ID, "exact").get_attribute("value") == "0.3"
    histogram = chrome.find_element(By.ID, "histogram").text
    assert "calibrated threshold 0.3" in histogram
    move(chrome, "exact", 0.25)
    assert counts(chrome) == ["2", "2"]
    chrome.find_element(By.ID, "reset").click()
    assert counts(chrome) == ["1", "3"]
    assert complaints(chrome) == []


def test_the_displayed_threshold_keeps_an_image_on_it_normal(
    tmp_path: Path, chrome: Chrome
) -> None:
    """At 359, with three digits, the second image would be above it."""
    threshold = 359.019287109375
    run = decide(
        make_run(tmp_path, {"cap": ([100.0, threshold, 400.0], [0] * 3)}), {"cap": threshold}
    )
    open_page(chrome, write_page(run))
    assert counts(chrome) == ["1", "2"]
    shown = chrome.find_element(By.ID, "exact").get_attribute("value")
    move(chrome, "exact", float(shown or 0))
    assert counts(chrome) == ["1", "2"]


def test_a_threshold_above_all_scores_is_in_view(tmp_path: Path, chrome: Chrome) -> None:
    run = decide(make_run(tmp_path, {"cap": ([0.1, 0.2], [0, 0])}), {"cap": 5.0})
    open_page(chrome, write_page(run))
    assert counts(chrome) == ["0", "2"]
    (line,) = chrome.find_elements(By.CSS_SELECTOR, "#histogram line.calibrated")
    assert float(line.get_attribute("x1") or 0) == 600


def test_each_category_has_its_calibrated_threshold(tmp_path: Path, chrome: Chrome) -> None:
    run = decide(make_run(tmp_path, TWO, pictures=8), {"cap": 0.25, "nut": 0.5}, predict=False)
    listed = json.loads((run / "gallery" / "gallery.json").read_text())
    for image, decision in zip(listed["pictures"], "nnaaaaaa", strict=True):
        image["decision"] = {"n": "normal", "a": "anomalous"}[decision]
    write_json(run / "gallery" / "gallery.json", listed)
    open_page(chrome, write_page(run))
    # TP 2 + 1, FP 0 + 3 at their own thresholds.
    assert counts(chrome)[:4] == ["3", "0", "3", "2"]
    assert len(chrome.find_elements(By.CSS_SELECTOR, "#histogram line.calibrated")) == 2
    verdicts = [badge.text for badge in chrome.find_elements(By.CSS_SELECTOR, "#gallery .verdict")]
    assert verdicts.count("false positive") == 3
    assert verdicts.count("true negative") == 2
    move(chrome, "exact", 3.5)  # one threshold for both
    assert counts(chrome)[:4] == ["0", "3", "1", "4"]
    chrome.find_element(By.ID, "reset").click()
    assert counts(chrome)[:4] == ["3", "0", "3", "2"]
    Select(chrome.find_element(By.ID, "category")).select_by_visible_text("nut")
    assert counts(chrome)[:4] == ["1", "0", "3", "0"]
    assert complaints(chrome) == []


def test_the_legend_chooses_a_category(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(make_run(tmp_path, TWO)))
    buttons = chrome.find_elements(By.CSS_SELECTOR, ".legend button")
    assert [button.text for button in buttons] == ["cap", "nut"]
    buttons[1].click()
    assert Select(chrome.find_element(By.ID, "category")).first_selected_option.text == "nut"
    assert [b.get_attribute("aria-pressed") for b in buttons] == ["false", "true"]
    colours = [
        chrome.execute_script("return getComputedStyle(arguments[0]).stroke", line)
        for line in chrome.find_elements(By.CSS_SELECTOR, ".legend line")
    ]
    assert len(set(colours)) == 2
    assert complaints(chrome) == []
