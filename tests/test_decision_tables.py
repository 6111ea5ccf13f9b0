"""Tables of the decisions of a test."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from anomaly_clip.recording.decision_record import share
from anomaly_clip.reporting.decision_tables import decision_tables


def section(categories: dict[str, dict[str, Any]], fdr: float | None = None) -> dict[str, Any]:
    return {"alpha": 0.01, "fdr": fdr, "categories": categories}


def printed(content: dict[str, Any], width: int = 80) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for table in decision_tables(content):
            console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


CAP = {
    "false_alarms": share(1, 20),
    "recall": share(9, 10),
    "kinds": {"cut": share(5, 5), "hole": share(4, 5)},
}
NUT = {"false_alarms": share(0, 4), "recall": None, "kinds": {}}


def test_rates_and_kinds() -> None:
    lines = printed(section({"cap": CAP, "nut": NUT}))
    assert lines[0] == "decisions, false-alarm rate 1 %"
    assert "cap 20 5.0 0.1–24.9 10 90.0 55.5–99.7" in lines
    assert "nut 4 0.0 0.0–60.2 0 – –" in lines
    assert "recall by kind of defect" in lines
    assert "cap cut 5 100.0 47.8–100.0" in lines
    assert "cap hole 5 80.0 28.4–99.5" in lines


def test_without_defects_there_is_no_table_of_kinds() -> None:
    assert len(decision_tables(section({"nut": NUT}))) == 1


def test_the_title_of_a_false_discovery_rate() -> None:
    assert printed(section({"nut": NUT}, 0.025))[0] == "decisions, false discovery rate 2.5 %"


def test_long_names_are_folded_and_markup_is_text() -> None:
    long = "a-very-long-name-of-a-category-that-does-not-fit-into-the-line"
    kinds = {**CAP, "kinds": {"[red]" + long: share(1, 1)}}
    lines = printed(section({"[b]" + long: kinds}))
    assert max(map(len, lines)) <= 80
    assert any("[b]" in line for line in lines)
    assert any("[red]" in line for line in lines)


def test_rates_other_than_that_of_the_title_are_explained() -> None:
    few = {**NUT, "as_asked": False}
    names = ["a", "b", "c", "[d]", "e"]
    text = " ".join(printed(section({"cap": CAP, **dict.fromkeys(names, few)})))
    assert "the smallest rate instead of 1 %, of too few images: a, b, c and 2 more" in text
    text = " ".join(printed(section({"[d]": few, "nut": {**NUT, "kind": "cross_validation"}})))
    assert "images: [d] rate estimated by cross-validation: nut" in text
    assert "smallest" not in " ".join(printed(section({"a": few}, fdr=0.1)))
