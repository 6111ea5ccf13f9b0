"""Folders with the files of a finished run, for tests that run nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly_clip.files import write_csv, write_json
from anomaly_clip.metrics.curves import image_curves
from anomaly_clip.metrics.evaluator import METRICS


def make_run(
    folder: Path,
    scores: Mapping[str, tuple[Sequence[float], Sequence[int]]],
    pictures: int = 0,
    **run: Any,
) -> Path:
    """Write the files of a test run: made-up metrics and the given scores."""
    metrics = dict.fromkeys(METRICS, 0.5) | {"image_auroc": 0.875, "pixel_pro": None}
    record = {
        "method": "SDP",
        "weights": {"backbone": "tiny", "pretrained": "w.pt", "random": False, "sha256": "0" * 64},
        "protocol": {
            "data": "MVTecAD",
            "split": "test",
            "complete": True,
            "images": {name: len(labels) for name, (_, labels) in scores.items()},
            "anomalous": {name: sum(labels) for name, (_, labels) in scores.items()},
        },
        "checkpoint": None,
        "seed": 0,
        "versions": {"python": "3"},
        **run,
    }
    categories = dict.fromkeys(scores, metrics)
    content = {"mean": metrics, "categories": categories, "intervals": {}, "run": record}
    write_json(folder / "metrics.json", content)
    table = [
        [f"{name}/{number}.png", name, label, value]
        for name, (values, labels) in scores.items()
        for number, (value, label) in enumerate(zip(values, labels, strict=True))
    ]
    write_csv(folder / "scores.csv", ["path", "category", "label", "image_score"], table)
    curves = {
        name: image_curves(np.array(values, np.float32), np.array(labels, bool))
        for name, (values, labels) in scores.items()
    }
    write_json(folder / "curves.json", curves)
    (folder / "config-test.yaml").write_text("model:\n  class_path: SDP  # </pre>\n")
    listed = []
    for number, row in enumerate(table[:pictures]):
        shape = (48, 152, 3)
        noise = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        (folder / "gallery").mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / "gallery" / f"{number}.webp")
        _, category, label, score = row
        listed.append(
            {
                "picture": f"{number}.webp",
                "name": f"{category}/{number}",
                "kind": "hit" if label else "false_alarm",
                "category": category,
                "label": label,
                "score": score,
                "gap": -number / 100,
                "full": False,
                "mask": True,
            }
        )
    if listed:
        write_json(folder / "gallery" / "gallery.json", {"pictures": listed})
    return folder


TWO = {
    "cap": ([0.1, 0.2, 0.3, 0.6], [0, 0, 1, 1]),
    "nut": ([1.0, 2.0, 4.0, 3.0], [0, 0, 0, 1]),
}
