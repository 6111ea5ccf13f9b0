"""``drift.csv`` of a predict: whether its images still look like the calibration images."""

from __future__ import annotations

from typing import Any, NamedTuple

from anomaly_clip.decisions.drift import DriftMonitor
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.results.map_store import Rows

__all__ = ["HEADER", "DriftRecord", "drift_record"]

HEADER = ["path", "category", "online_p_value", "log10_martingale"]
"""Columns of ``drift.csv``."""


class DriftRecord(NamedTuple):
    """The drift of all images of a run, per category."""

    table: list[list[Any]]
    """Rows of ``drift.csv``, in the order of the listing; see `HEADER`."""
    categories: dict[str, dict[str, Any]]
    """By category: alarm, largest value of the martingale, path of the image that raised it."""


def drift_record(decisions: Decisions, rows: Rows) -> DriftRecord:
    """Return the drift of the images, taken in the order of the listing.

    Args:
        decisions: The decisions of the run, whose scores are compared with the calibration's.
        rows: Rows of all images, with their final scores.
    """
    monitors = {
        name: DriftMonitor(record.all_scores, seed=decisions.seed)
        for name, record in decisions.records.items()
    }
    table: list[list[Any]] = []
    places: dict[str, str] = {}
    for row in rows.values():
        name = row["category"]
        monitor = monitors[name]
        value = monitor.update(row["image_score"])
        table.append([row["path"], name, value, monitor.log10])
        if monitor.alarm:
            places.setdefault(name, row["path"])
    return DriftRecord(
        table,
        {
            name: {
                "alarm": monitor.alarm,
                "largest": monitor.largest,
                "at": places.get(name),
            }
            for name, monitor in monitors.items()
        },
    )
