"""Section ``decisions`` of the results, and its lines on the screen."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.decisions.sentences import guarantee
from anomaly_clip.methods import MuSc
from anomaly_clip.recording.decision_record import (
    decision_lines,
    decisions_record,
    no_decisions,
    num_anomalous,
    share,
)
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.results.map_store import Rows

SCORES = tuple(float(score) for score in range(19))


def decisions_of(fdr: float | None = None, **record: Any) -> Decisions:
    records = {
        "cap": CategoryCalibration(SCORES, map_threshold=7.0, **record),
        "nut": CategoryCalibration(SCORES[:5], **record),
    }
    return Decisions(Calibration("PaDiM", records), "runs/a/1", categories=[*records], fdr=fdr)


def rows_of(decisions: Decisions, *images: tuple[str, int | None, float]) -> Rows:
    rows: Rows = {
        number: {"path": f"{number}.png", "category": name, "label": label, "image_score": score}
        for number, (name, label, score) in enumerate(images)
    }
    decisions.decide(rows, replaces_score=True)
    return rows


IMAGES = (
    ("cap", 0, 1.0),
    ("cap", 0, 99.0),
    ("cap", 0, 2.0),
    ("cap", 1, 99.0),
    ("cap", 1, 98.0),
    ("cap", 1, 3.0),
    ("nut", 0, 0.0),
)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (1, 1)])
def test_a_share_has_its_exact_interval(count: int, total: int) -> None:
    ours = share(count, total)
    assert ours is not None
    theirs = binomtest(count, total).proportion_ci(0.95, method="exact")
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high))
    assert (ours["count"], ours["total"], ours["value"]) == (count, total, count / total)


def test_a_share_of_no_images_is_none() -> None:
    assert share(0, 0) is None


def test_the_section_of_a_predict() -> None:
    decisions = decisions_of()
    rows = rows_of(decisions, *((name, None, score) for name, _, score in IMAGES))
    highest = {0: 7.0, 1: 99.0, 2: 7.5, 5: 8.0}  # 6 has no map, and "nut" no threshold
    drift = {"cap": {"alarm": False, "largest": 1.0, "at": None}}
    section = decisions_record(decisions, rows, highest, drift=drift)
    assert (section["alpha"], section["confidence"], section["fdr"]) == (0.05, None, None)
    assert section["source"] == "runs/a/1"
    cap, nut = section["categories"]["cap"], section["categories"]["nut"]
    assert (cap["num_images"], cap["num_anomalous"]) == (6, 3)
    assert (cap["n"], cap["k"], cap["threshold"], cap["as_asked"]) == (19, 1, 18.0, True)
    assert cap["normal_with_marked_pixels"] == 2  # 2 and 5; the threshold itself is not marked
    assert (cap["average"], round(cap["guaranteed"], 3)) == (0.05, 0.146)
    assert cap["drift"] == drift["cap"]
    assert (nut["map_threshold"], nut["normal_with_marked_pixels"]) == (None, 0)
    assert (nut["n"], nut["as_asked"], nut["drift"]) == (5, False, None)
    assert "recall" not in cap
    record = decisions.records["cap"]
    assert cap["sentence"] == guarantee(record, decisions.levels["cap"])
    assert num_anomalous(rows) == 3


def test_the_section_of_a_test_has_recall_false_alarms_and_kinds() -> None:
    decisions = decisions_of()
    rows = rows_of(decisions, *IMAGES)
    kinds = dict(enumerate(("good", "good", "good", "cut", "hole", "hole", "good")))
    section = decisions_record(decisions, rows, {}, kinds)
    cap, nut = section["categories"]["cap"], section["categories"]["nut"]
    assert cap["recall"] == share(2, 3)
    assert cap["false_alarms"] == share(1, 3)
    assert cap["kinds"] == {"cut": share(1, 1), "hole": share(1, 2)}
    assert (nut["recall"], nut["false_alarms"], nut["kinds"]) == (None, share(0, 1), {})
    assert cap["drift"] is None


def test_lines_on_the_screen() -> None:
    decisions = decisions_of()
    rows = rows_of(decisions, *((name, None, score) for name, _, score in IMAGES))
    drift = {"cap": {"alarm": True, "largest": 5e20, "at": "3.png"}, "nut": {"alarm": False}}
    lines = decision_lines(decisions_record(decisions, rows, {2: 8.0}, drift=drift))
    assert lines[0].startswith("cap: 3 of 6 images anomalous. With these 19 calibration images, ")
    assert lines[1].startswith("nut: 0 of 1 image anomalous. With these 5 ")
    assert "cannot be had" in lines[1]
    assert lines[2].startswith("1 normal image has marked pixels")
    assert lines[3].startswith("cap: images differ from the calibration images since 3.png: ")
    assert "they have drifted, or many are defective (martingale 5e+20 " in lines[3]
    assert len(lines) == 4


def test_lines_of_a_false_discovery_rate_promise_that_rate_only() -> None:
    decisions = decisions_of(fdr=0.1)
    rows = rows_of(decisions, *((name, None, score) for name, _, score in IMAGES))
    section = decisions_record(decisions, rows, {})
    assert section["fdr"] == 0.1
    (line, _) = decision_lines(section)
    assert "at most 10 % are expected to be normal" in line
    assert "false alarms" not in line


def test_a_cross_validation_promises_nothing() -> None:
    decisions = decisions_of(kind="cross_validation")
    (line, _) = decision_lines(decisions_record(decisions, rows_of(decisions), {}))
    assert "no guarantee" in line


def test_a_cross_validation_promises_no_false_discovery_rate_and_no_bound_of_drift() -> None:
    decisions = decisions_of(fdr=0.2, kind="cross_validation")
    drift = {"cap": {"alarm": True, "largest": 123.0, "at": "1.png"}}
    section = decisions_record(decisions, rows_of(decisions, *IMAGES), {}, drift=drift)
    sentence = section["categories"]["cap"]["sentence"]
    assert "at 20 %, with p-values estimated by cross-validation on 19 images" in sentence
    assert sentence.endswith("This is no guarantee.")
    assert "expected to be normal" not in sentence
    *_, line = decision_lines(section)
    assert "martingale 123 in drift.csv; by cross-validation, so the alarm has no proven b" in line
    assert "1 % of runs" not in line


def test_the_way_to_a_calibration() -> None:
    method = MuSc(CNNSettings("squeezenet1_1", "random"), ["features.12"])
    assert "MuSc scores images by each other: look at" in no_decisions(None, method)
    method.transductive = False  # type: ignore[misc]
    assert "anomaly_clip calibrate --ckpt_path 'runs/my run/1' --data.root" in no_decisions(
        "runs/my run/1", method
    )
    assert "for --calibration.file" in no_decisions(None, method)
