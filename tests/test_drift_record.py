"""``drift.csv`` of a predict."""

from __future__ import annotations

import numpy as np

from anomaly_clip.decisions.calibration import Calibration, CategoryCalibration
from anomaly_clip.decisions.drift import martingale_log10, online_p_values
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.recording.drift_record import HEADER, drift_record
from anomaly_clip.results.map_store import Rows


def test_each_category_is_a_stream_of_its_own() -> None:
    rng = np.random.default_rng(0)
    records = {name: CategoryCalibration(tuple(sorted(rng.normal(size=50)))) for name in ("a", "b")}
    settings = CalibrationSettings(seed=3)
    decisions = Decisions(Calibration("SDP", records), "c", settings, [*records, "a"][:2])
    streams = {"a": rng.normal(size=30), "b": rng.normal(5, 1, size=30)}  # b is shifted
    rows: Rows = {}
    for number in range(30):
        for name, stream in streams.items():
            score = float(stream[number])
            rows[len(rows)] = {"path": f"{name}{number}", "category": name, "image_score": score}
    record = drift_record(decisions, rows)
    assert len(HEADER) == len(record.table[0]) == 4
    assert [line[:2] for line in record.table[:3]] == [["a0", "a"], ["b0", "b"], ["a1", "a"]]
    for name, stream in streams.items():
        values = online_p_values(stream, records[name].scores, seed=3)
        lines = np.array([line[2:] for line in record.table if line[1] == name], dtype=float)
        np.testing.assert_allclose(lines[:, 0], values)
        path = martingale_log10(values)
        np.testing.assert_allclose(lines[:, 1], path)
        entry = record.categories[name]
        assert entry["alarm"] == bool((path >= 2).any())
        if entry["alarm"]:
            assert entry["at"] == f"{name}{int((path >= 2).argmax())}"
        else:
            assert entry["at"] is None
    assert [entry["alarm"] for entry in record.categories.values()] == [False, True]


def test_without_images_there_is_no_alarm() -> None:
    records = {"a": CategoryCalibration((1.0,))}
    record = drift_record(Decisions(Calibration("SDP", records), "c", categories=["a"]), {})
    assert record.table == []
    assert record.categories == {"a": {"alarm": False, "largest": 1.0, "at": None}}
