"""Section ``decisions`` of results, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folder import THRESHOLDS, TWO, decide, make_run

from anomaly_clip.errors import UserError
from anomaly_clip.files import write_json
from anomaly_clip.reporting.page import write_page
from anomaly_clip.results.decision_section import Share, read_decisions
from anomaly_clip.results.run_files import read_files


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
def test_a_damaged_section_is_an_error_of_one_line(tmp_path: Path, damage: dict[str, Any]) -> None:
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
    run = decide(make_run(tmp_path, {"cap": TWO["cap"]}), {"cap": 0.25})
    content = json.loads((run / "predict.json").read_text())
    content["decisions"]["categories"]["cap"][name] = None
    write_json(run / "predict.json", content)
    with pytest.raises(UserError, match="damaged section decisions"):
        read_files(run)


def test_the_section_by_hand(tmp_path: Path) -> None:
    run = decide(make_run(tmp_path, TWO), THRESHOLDS)
    content = json.loads((run / "predict.json").read_text())
    nut = content["decisions"]["categories"]["nut"]
    share = {"count": 1, "total": 3, "value": 1 / 3, "low": 0.01, "high": 0.9}
    nut |= {"recall": share, "false_alarms": None, "kinds": {"dent": share, "none": None}}
    nut |= {"drift": {"alarm": True, "largest": 250.0, "at": None}, "kind": "cross_validation"}
    section = read_decisions(content, run / "predict.json")
    assert section is not None
    assert (section.alpha, section.confidence, section.fdr) == (0.05, None, None)
    assert (section.num_images, section.num_anomalous) == (8, 3)
    cap, nut = section.categories["cap"], section.categories["nut"]
    assert (cap.threshold, cap.map_threshold, cap.drift, cap.recall) == (0.25, 0.5, None, None)
    assert (cap.is_guaranteed, nut.is_guaranteed, nut.drift) == (True, False, 250.0)
    assert nut.recall == nut.kinds["dent"] == Share(1, 3, 1 / 3, 0.01, 0.9)
    assert list(nut.kinds) == ["dent"]
    assert read_decisions({}, run / "predict.json") is None
