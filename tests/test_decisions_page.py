"""The tables and numbers of docs/decisions.md follow from the code and from stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anomaly_clip.decisions.conformal import guaranteed_rate, normals_needed, rank_of
from anomaly_clip.decisions.sentences import percent

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())


def result(name: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def guaranteed(alpha: float, n: int) -> str:
    k = rank_of(alpha, n)
    return percent(guaranteed_rate(k, n)) if k else "-"


def test_the_table_of_images_needed() -> None:
    rows = [
        f"| {percent(alpha)} | {normals_needed(alpha):,} | {normals_needed(alpha, 0.95):,} "
        f"| {guaranteed(alpha, 100)} | {guaranteed(alpha, 300)} |"
        for alpha in (0.1, 0.05, 0.02, 0.01, 0.001)
    ]
    assert "\n".join(rows) in PAGE


def test_the_tables_of_magnetic_tiles() -> None:
    runs = result("calibration_magnetic_tile")["runs"]
    header = f"| draw of calibration images | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}"
    names = {
        "by image": "image by image",
        "by tile": "by whole tiles",
        "new tiles": "from fitted tiles, rates on new tiles",
    }
    rows = [header]
    for way, name in names.items():
        cells = [
            f"{entry['inside']} of 20; {percent(entry['mean'])} "
            f"({percent(min(entry['rates']))} to {percent(max(entry['rates']))})"
            for entry in (run["ways"][way] for run in runs.values())
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    assert "\n".join(rows) in PAGE
    rows = [f"| defect | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}"]
    for kind in next(iter(runs.values()))["recall"]:
        cells = [
            f"{entry['count']} of {entry['total']}: {percent(entry['value'])} "
            f"({percent(entry['low'])} to {percent(entry['high'])})"
            for entry in (run["recall"][kind] for run in runs.values())
        ]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    assert "\n".join(rows) in PAGE
    assert "PaDiM calls almost three times as many normal images anomalous" in WORDS
    assert 2.5 < runs["PaDiM"]["ways"]["new tiles"]["mean"] / 0.05 < 3


def test_the_numbers_of_the_simulations() -> None:
    content = result("conformal")
    drift, few = content["drift"], content["few_images"]
    medians = {
        name: [
            f"{drift['delays'][f'shift {s}, {name}']['median_images']:g}" for s in (1.0, 2.0, 4.0)
        ]
        for name in ("mixture", "epsilon 0.92")
    }
    assert "after {}, {} or {} images (medians".format(*medians["mixture"]) in WORDS
    assert "0.92 after {}, {} or {}.".format(*medians["epsilon 0.92"]) in WORDS
    wrong = content["cells"]["ranges of the calibration images, n 19, alpha 0.05"]["average"]
    assert f"5 % becomes {percent(wrong)} on average" in WORDS
    alarms = drift["false_alarms"]
    share = round(alarms["continuous, epsilon 0.92, p-values of decisions"], 2)
    assert f"in {percent(share)} of unchanged streams of {drift['images']:,} images" in WORDS
    assert f"it is {percent(round(alarms['continuous, mixture'], 3))}." in WORDS
    assert few["images"] == 40
    assert f"{percent(few['proven_rate_of_all_models'])} at 5 %" in WORDS
    rates = percent(few["rate_of_all_models"]), percent(few["rate_of_one_refit"])
    assert "the rate is {} by all models and {} by the refit".format(*rates) in WORDS


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "decisions.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "at most 4.9% on average, 11.3% guaranteed"
    assert lines[-1] == "False"
