"""Decisions on rows of images, by a calibration."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.errors import UserError
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.results.map_store import Rows

TEN = tuple(float(score) for score in range(10))


def calibration(**categories: CategoryCalibration) -> Calibration:
    return Calibration("PaDiM", categories, alphas=(0.2, 0.1))


def rows_of(*images: tuple[str, float]) -> Rows:
    return {
        2 * number: {"path": f"{number}.png", "category": name, "label": 0, "image_score": score}
        for number, (name, score) in enumerate(images)
    }


def decided(decisions: Decisions, rows: Rows, replaces_score: bool = True) -> Rows:
    rows = copy.deepcopy(rows)
    decisions.decide(rows, replaces_score)
    return rows


def test_each_category_has_its_own_threshold() -> None:
    high = CategoryCalibration(tuple(score + 100 for score in TEN))
    decisions = Decisions(
        calibration(cap=CategoryCalibration(TEN), nut=high), "c.json", categories=["cap", "nut"]
    )
    rows = decided(decisions, rows_of(("cap", 8.0), ("nut", 9.0), ("cap", 8.5), ("nut", 108.5)))
    assert decisions.levels["cap"].k == 2  # of 11 ranks, at 0.2
    # The threshold itself, the second highest score, is normal.
    assert [row["decision"] for row in rows.values()] == [
        "normal",
        "normal",
        "anomalous",
        "anomalous",
    ]
    assert [row["p_value"] for row in rows.values()] == pytest.approx([3 / 11, 1, 2 / 11, 2 / 11])
    assert [*rows[0]] == ["path", "category", "label", "image_score", "p_value", "decision"]


@pytest.mark.parametrize(
    ("settings", "alpha", "confidence"),
    [
        (CalibrationSettings(), 0.2, None),  # the first rate of the calibration
        (CalibrationSettings(alpha=0.05), 0.05, None),
        (CalibrationSettings(alpha=0.3), 0.3, None),
        (CalibrationSettings(alpha=[0.4, 0.05]), 0.4, None),
        (CalibrationSettings(confidence=0.9), 0.2, 0.9),
    ],
)
def test_the_rate_is_that_of_the_calibration_unless_another_is_given(
    settings: CalibrationSettings, alpha: float, confidence: float | None
) -> None:
    decisions = Decisions(calibration(cap=CategoryCalibration(TEN)), "c", settings, ["cap"])
    assert (decisions.alpha, decisions.confidence) == (alpha, confidence)
    assert decisions.levels["cap"].alpha == alpha
    assert f"requested false-alarm rate {100 * alpha:g} %" in decisions.describe()


def test_a_rate_that_cannot_be_had_uses_the_smallest() -> None:
    settings = CalibrationSettings(alpha=0.01)
    decisions = Decisions(calibration(cap=CategoryCalibration(TEN)), "c", settings, ["cap"])
    assert not decisions.levels["cap"].is_as_asked
    rows = decided(decisions, rows_of(("cap", 9.0), ("cap", 9.1)))
    assert [row["decision"] for row in rows.values()] == ["normal", "anomalous"]


@pytest.mark.parametrize("is_named", [False, True])
def test_a_category_without_a_calibration(is_named: bool) -> None:
    single = calibration(cap=CategoryCalibration(TEN))
    several = calibration(cap=CategoryCalibration(TEN), nut=CategoryCalibration(TEN))
    with pytest.raises(UserError, match=r"c\.json: the calibration has no category 'new'"):
        Decisions(several, "c.json", categories=["new"], is_named=is_named)
    if is_named:
        with pytest.raises(UserError, match=r"c\.json: the calibration has no category 'new'"):
            Decisions(single, "c.json", categories=["new"])
    else:
        decisions = Decisions(single, "c.json", categories=["new"], is_named=False)
        assert decided(decisions, rows_of(("new", 99.0)))[0]["decision"] == "anomalous"


@pytest.mark.parametrize("replaces_score", [False, True])
def test_score_parts_are_scaled_by_the_ranges_of_the_calibration(replaces_score: bool) -> None:
    record = CategoryCalibration((0.1, 0.2, 1.5), part_ranges=((0.0, 2.0), (10.0, 20.0)))
    decisions = Decisions(calibration(cap=record), "c", CalibrationSettings(alpha=0.3), ["cap"])
    rows = rows_of(("cap", 5.0), ("cap", 5.0))
    rows[0] |= {"r0": 1.0, "r1": 30.0}
    rows[2] |= {"r0": 1.0, "r1": 5.0}  # below the range: not clamped
    rows = decided(decisions, rows, replaces_score)
    column = "image_score" if replaces_score else "decision_score"
    assert [row[column] for row in rows.values()] == [2.5, 0.0]
    assert replaces_score or [row["image_score"] for row in rows.values()] == [5.0, 5.0]
    assert [row["decision"] for row in rows.values()] == ["anomalous", "normal"]
    assert [*rows[0]][3:6] == ["image_score", "r0", "r1"]
    assert [*rows[0]][-2:] == ["p_value", "decision"]


def by_hand(values: list[float], rate: float) -> list[bool]:
    """Return the procedure of Benjamini and Hochberg as they describe it."""
    in_order = sorted(values)
    largest = max(
        (p for rank, p in enumerate(in_order, 1) if p <= rank * rate / len(values)), default=-1.0
    )
    return [p <= largest for p in values]


@given(st.lists(st.floats(-1, 12), min_size=1, max_size=15), st.sampled_from([0.1, 0.3, 0.5]))
def test_the_false_discovery_rate_is_that_of_all_images(scores: list[float], rate: float) -> None:
    records = {"cap": CategoryCalibration(TEN), "nut": CategoryCalibration(TEN[:5])}
    decisions = Decisions(calibration(**records), "c", categories=[*records], fdr=rate)
    names = [("cap", "nut")[number % 2] for number in range(len(scores))]
    rows = decided(decisions, rows_of(*zip(names, scores, strict=True)))
    values = [row["p_value"] for row in rows.values()]
    expected = by_hand(values, rate)
    assert [row["decision"] == "anomalous" for row in rows.values()] == expected


def test_colour_scales_start_at_the_map_threshold() -> None:
    records = {
        "cap": CategoryCalibration(TEN, map_threshold=5.0),
        "nut": CategoryCalibration(TEN),
        "pin": CategoryCalibration(TEN, map_threshold=50.0),
    }
    decisions = Decisions(calibration(**records), "c", categories=[*records])
    ranges = {"cap": [1.0, 9.0], "nut": [1.0, 9.0], "pin": [1.0, 9.0]}
    assert decisions.colour_ranges(ranges) == {
        "cap": [5.0, 9.0],
        "nut": [1.0, 9.0],
        "pin": [50.0, 50.0],  # no map reaches the threshold
    }
    assert decisions.map_thresholds == {"cap": 5.0, "pin": 50.0}


def test_without_images_nothing_is_decided() -> None:
    decisions = Decisions(
        calibration(cap=CategoryCalibration(TEN)), "c", categories=["cap"], fdr=0.1
    )
    assert decided(decisions, {}) == {}
    assert np.isfinite(decisions.levels["cap"].threshold)


def test_names_that_are_not_utf8_are_found_in_files_and_checkpoints(tmp_path: Path) -> None:
    name = "gr\udcfcn"
    written = Calibration("PaDiM", {name: CategoryCalibration(TEN)})
    written.write(tmp_path / "c.json")
    for read in (written, Calibration.read(tmp_path / "c.json")):
        decisions = Decisions(read, "c.json", categories=[name])
        assert decided(decisions, rows_of((name, 99.0)))[0]["decision"] == "anomalous"


@pytest.mark.parametrize(("num_images", "is_explained"), [(2, False), (5, True)])
def test_a_false_discovery_rate_that_few_calibration_images_cannot_reach(
    num_images: int, is_explained: bool
) -> None:
    records = {"cap": CategoryCalibration(TEN)}
    decisions = Decisions(calibration(**records), "c", categories=["cap"], fdr=0.2)
    rows = decided(decisions, rows_of(("cap", 99.0), *[("cap", 0.0)] * (num_images - 1)))
    # The smallest p-value is 1/11: of 2 images, 0.1 is the limit of the first rank; of 5, 0.04.
    assert (rows[0]["decision"] == "anomalous") != is_explained
    text = decisions.too_few_for_fdr(rows)
    assert (text is not None) == is_explained
    assert (
        text is None or "the p-value of 1 image is the smallest that there can be, 0.0909" in text
    )
    normal = decided(decisions, rows_of(("cap", 0.0)))
    assert decisions.too_few_for_fdr(normal) is None
