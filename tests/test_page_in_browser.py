"""Report page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import browser, open_page
from helpers import save_picture
from run_folder import TWO, make_run
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from anomaly_clip.cli import main
from anomaly_clip.files import write_json
from anomaly_clip.metric_values import METRICS
from anomaly_clip.reporting.page import PAGE, write_page

MARKUP = "<b onclick=\"x\">nut</b> & 'bolt'</script>"


@pytest.fixture
def predict_options(tiny_sdp: list[str], mvtec_root: Path) -> list[str]:
    """Return the options to predict six images without labels."""
    folder = mvtec_root / "bottle" / "train" / "good"
    for number in range(4):
        save_picture(folder / f"{number}.png", size=30 + number)
    words = [word for word in tiny_sdp if not word.startswith("--data.root")]
    words += ["--data=ImageFolder", "--data.category=bottle", f"--data.root={folder}"]
    return [*words, "--output.name=own"]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


def counts(chrome: Chrome) -> list[str]:
    return [cell.text for cell in chrome.find_elements(By.CSS_SELECTOR, "#counts td:last-child")]


def move(chrome: Chrome, element_id: str, value: float) -> None:
    """Set the value of a slider or a field as a user would."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    chrome.execute_script(script, chrome.find_element(By.ID, element_id), str(value))


def complaints(chrome: Chrome) -> list[str]:
    return [entry["message"] for entry in chrome.get_log("browser")]


def test_the_threshold_changes_the_counts(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(make_run(tmp_path, TWO, pictures=8)))
    Select(chrome.find_element(By.ID, "category")).select_by_visible_text("cap")
    # The initial threshold has the highest F1: TP 2, FN 0, FP 0, TN 2.
    assert counts(chrome) == ["2", "0", "0", "2", "100.0 %", "0.0 %", "100.0 %", "100.0 %"]
    move(chrome, "threshold", 0)  # the lowest score
    assert counts(chrome)[:4] == ["2", "0", "2", "0"]
    move(chrome, "threshold", 1000)  # the highest
    assert counts(chrome)[:4] == ["1", "1", "0", "2"]
    move(chrome, "exact", 0.15)
    assert counts(chrome)[:4] == ["2", "0", "1", "1"]
    verdicts = [
        badge.text
        for badge in chrome.find_elements(By.CSS_SELECTOR, ".gallery .verdict")
        if badge.is_displayed()
    ]
    assert sorted(verdicts) == ["false positive", "true negative", "true positive", "true positive"]
    chrome.find_element(By.ID, "reset").click()
    assert counts(chrome)[:4] == ["2", "0", "0", "2"]
    assert complaints(chrome) == []


def test_the_counts_are_those_of_the_scores(tmp_path: Path, chrome: Chrome) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.6).astype(int)
    scores = (rng.normal(size=400) + labels).astype(np.float32)
    open_page(chrome, write_page(make_run(tmp_path, {"cap": (scores.tolist(), labels.tolist())})))
    for level in (-0.5, 0.25, float(scores[7]), 1.5):
        move(chrome, "exact", level)
        predicted = scores.astype(np.float64) >= level
        expected = [
            (predicted & (labels == 1)).sum(),
            (~predicted & (labels == 1)).sum(),
            (predicted & (labels == 0)).sum(),
            (~predicted & (labels == 0)).sum(),
        ]
        assert counts(chrome)[:4] == [str(number) for number in expected]


def test_a_category_can_be_chosen(tmp_path: Path, chrome: Chrome) -> None:
    run = make_run(tmp_path, {MARKUP: TWO["cap"], "nut": TWO["nut"]}, pictures=8)
    open_page(chrome, write_page(run))
    assert counts(chrome)[:4] == ["3", "0", "3", "2"]  # all categories at one threshold
    chrome.find_elements(By.CSS_SELECTOR, "#metrics tbody tr")[1].click()
    assert Select(chrome.find_element(By.ID, "category")).first_selected_option.text == "nut"
    cards = chrome.find_elements(By.CSS_SELECTOR, ".gallery .card")
    shown = [card for card in cards if card.is_displayed()]
    assert len(shown) == 4
    assert all("nut/" in card.text for card in shown)
    assert len(chrome.find_elements(By.CSS_SELECTOR, ".curve.chosen")) == 2
    assert complaints(chrome) == []


def test_heat_map_and_mask_are_shown_on_request(tmp_path: Path, chrome: Chrome) -> None:
    run = make_run(tmp_path, TWO, pictures=2)
    file = run / "gallery" / "gallery.json"
    listed = json.loads(file.read_text())
    for entry in listed["pictures"]:  # three panels of 48 pixels, with 4 between them
        entry |= {"overlay": True, "mask": False, "panel": [48, 48], "scale": [0, 1]}
    write_json(file, listed)
    open_page(chrome, write_page(run))
    sheet = chrome.find_element(By.CSS_SELECTOR, "#gallery .sheet")
    front = sheet.size["width"] / sheet.size["height"]
    assert front == pytest.approx(100 / 48, abs=0.02)
    chrome.find_element(By.ID, "all-panels").click()
    assert sheet.size["width"] / sheet.size["height"] == pytest.approx(152 / 48, abs=0.03)
    assert complaints(chrome) == []


def test_only_the_first_of_many_images_are_shown(tmp_path: Path, chrome: Chrome) -> None:
    many = {f"c{number}": ([0.1 * number, 0.9], [0, 1]) for number in range(9)}
    many["cap"] = ([0.1] * 8, [0] * 8)
    open_page(chrome, write_page(make_run(tmp_path, many, pictures=26)))
    alarms = "#gallery .kind:first-of-type .card"

    def shown() -> int:
        return sum(card.is_displayed() for card in chrome.find_elements(By.CSS_SELECTOR, alarms))

    assert shown() == 12
    more = chrome.find_element(By.CSS_SELECTOR, "#gallery .kind:first-of-type .more")
    assert more.text == "show all 17"
    more.click()
    assert shown() == 17
    assert not more.is_displayed()
    Select(chrome.find_element(By.ID, "category")).select_by_visible_text("cap")
    assert shown() == 8
    assert complaints(chrome) == []


def test_the_table_sorts(tmp_path: Path, chrome: Chrome) -> None:
    run = make_run(tmp_path, TWO)
    content = json.loads((run / "metrics.json").read_text())
    content["categories"]["nut"] = dict.fromkeys(METRICS, 0.95)
    write_json(run / "metrics.json", content)
    open_page(chrome, write_page(run))
    names = lambda: [  # noqa: E731
        cell.text for cell in chrome.find_elements(By.CSS_SELECTOR, "#metrics tbody td:first-child")
    ]
    buttons = chrome.find_elements(By.CSS_SELECTOR, "#metrics thead button")
    assert names() == ["cap", "nut"]
    buttons[1].click()
    assert names() == ["nut", "cap"]
    buttons[1].click()
    assert names() == ["cap", "nut"]


@pytest.mark.parametrize("width", [1280, 400])
def test_both_themes_fit_the_window(tmp_path: Path, chrome: Chrome, width: int) -> None:
    page = write_page(make_run(tmp_path, {"a_very_long_name_" * 8: TWO["cap"], **TWO}, pictures=8))
    backgrounds = []
    for theme in ("light", "dark"):
        open_page(chrome, page, width, theme)
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
        script = "return getComputedStyle(document.body).backgroundColor"
        backgrounds.append(chrome.execute_script(script))
        assert complaints(chrome) == []
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 22, 26)"]


@pytest.mark.parametrize("width", [1280, 400])
def test_tables_of_runs_are_readable(tmp_path: Path, chrome: Chrome, width: int) -> None:
    runs = [str(make_run(tmp_path / name, TWO)) for name in ("a", "b")]
    for words in ([*runs], ["--table", "tab1"]):
        assert main(["report", *words, "--html", str(tmp_path / "table.html")]) == 0
        open_page(chrome, tmp_path / "table.html", width)
        first = chrome.find_element(By.CSS_SELECTOR, "tbody td:first-child")
        assert first.size["width"] > 80  # not wrapped at every letter
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
        assert complaints(chrome) == []


def test_odd_runs_cause_no_error_in_the_script(tmp_path: Path, chrome: Chrome) -> None:
    odd = {
        "normal": {"cap": ([0.1, 0.2], [0, 0])},
        "one": {"cap": ([0.5], [1])},
        "equal": {"cap": ([0.5, 0.5], [0, 1])},
        "mixed": {"cap": ([0.1, 0.2], [0, 0]), "nut": ([0.3], [1])},
    }
    for name, scores in odd.items():
        open_page(chrome, write_page(make_run(tmp_path / name, scores, pictures=2)))
        # A single class has no threshold until the slider is moved.
        assert len(counts(chrome)) == (0 if name in ("normal", "one") else 8), name
        move(chrome, "threshold", 500)
        assert len(counts(chrome)) == 8, name
        assert complaints(chrome) == [], name
    run = make_run(tmp_path / "none", TWO)
    (run / "scores.csv").unlink()
    open_page(chrome, write_page(run))
    assert complaints(chrome) == []


def test_a_predict_without_a_calibration_decides_nothing(
    predict_options: list[str], tmp_path: Path, chrome: Chrome
) -> None:
    assert main(["predict", *predict_options]) == 0
    open_page(chrome, tmp_path / "runs" / "own" / "1-predict" / PAGE)
    assert counts(chrome) == []
    assert not chrome.find_element(By.ID, "mark").is_displayed()
    assert "This slider decides nothing" in chrome.find_element(By.ID, "rule").text
    move(chrome, "threshold", 0)
    assert counts(chrome) == ["6", "0"]
    move(chrome, "threshold", 1000)
    assert counts(chrome) == ["1", "5"]
    chrome.find_element(By.ID, "reset").click()
    assert counts(chrome) == []
    assert complaints(chrome) == []


def test_the_displayed_threshold_gives_the_same_counts(tmp_path: Path, chrome: Chrome) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    scores = (0.5 + 1e-5 * (rng.normal(size=60) + labels)).astype(np.float32)
    open_page(chrome, write_page(make_run(tmp_path, {"cap": (scores.tolist(), labels.tolist())})))
    before = counts(chrome)
    shown = chrome.find_element(By.ID, "exact").get_attribute("value")
    assert shown is not None
    assert shown.startswith("0.5000")
    move(chrome, "exact", float(shown))
    assert counts(chrome) == before
    ticks = [tick.text for tick in chrome.find_elements(By.CSS_SELECTOR, "#histogram text")]
    assert len(set(ticks)) == len(ticks)


def test_each_image_is_classified_by_its_category(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(make_run(tmp_path, TWO, pictures=8)))

    def verdicts() -> list[str]:
        badges = chrome.find_elements(By.CSS_SELECTOR, ".gallery .verdict")
        return [badge.text for badge in badges]

    # At the thresholds of the categories, only nut's normal image with score 4.0 is misclassified.
    assert verdicts().count("false positive") == 1
    assert verdicts().count("false negative") == 0
    # At 0.5 for both, nut has three false positives, and cap's defect with score 0.3 is missed.
    move(chrome, "exact", 0.5)
    assert verdicts().count("false positive") == 3
    assert verdicts().count("false negative") == 1
    chrome.find_element(By.ID, "reset").click()
    assert verdicts().count("false positive") == 1


def test_print_shows_everything(tmp_path: Path, chrome: Chrome) -> None:
    many = {f"c{number}": ([0.1, 0.9], [0, 1]) for number in range(15)}
    open_page(chrome, write_page(make_run(tmp_path, many, pictures=30)))
    chrome.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert chrome.find_element(By.CSS_SELECTOR, "details pre").is_displayed()
    cards = chrome.find_elements(By.CSS_SELECTOR, ".gallery .card")
    assert len(cards) == 30
    assert all(card.is_displayed() for card in cards)


def test_rows_are_chosen_by_keyboard(tmp_path: Path, chrome: Chrome) -> None:
    open_page(chrome, write_page(make_run(tmp_path, TWO)))
    chrome.find_elements(By.CSS_SELECTOR, "#metrics tbody tr")[0].send_keys(Keys.ENTER)
    assert Select(chrome.find_element(By.ID, "category")).first_selected_option.text == "cap"
    chrome.find_elements(By.CSS_SELECTOR, "#metrics thead button")[1].click()
    heads = chrome.find_elements(By.CSS_SELECTOR, "#metrics thead th")
    assert [head.get_attribute("aria-sort") for head in heads[:2]] == [None, "descending"]
