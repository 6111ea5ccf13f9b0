"""Numbers of images in the protocol of a test. Its other entries are tested with whole runs."""

from __future__ import annotations

from anomaly_clip.recording.metrics_record import image_counts


def test_counts_of_categories_with_images() -> None:
    labels = [("nut", 1), ("cap", 0), ("nut", 0), ("nut", 1)]
    rows = {index: {"category": name, "label": label} for index, (name, label) in enumerate(labels)}
    counts = image_counts(rows, {"cap": {}, "nut": {}, "pin": {}})
    assert counts == {"cap": (1, 0), "nut": (3, 2)}
    assert list(counts) == ["cap", "nut"]
