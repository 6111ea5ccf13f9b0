"""Folders with the files of a finished run, for tests that run nothing."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomaly_clip.files import read_csv, write_csv, write_json
from anomaly_clip.metric_values import METRICS
from anomaly_clip.metrics.curves import image_curves
from anomaly_clip.reporting.page import PAGE, write_page


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

SENTENCE = "With these 19 calibration images, at most 5 % false alarms are expected on average."


def decide(
    folder: Path, thresholds: Mapping[str, float], predict: bool = True, **entry: Any
) -> Path:
    """Add decisions at thresholds to a run from `make_run`.

    Args:
        folder: The run's folder.
        thresholds: Threshold by category; p-values are made up.
        predict: Whether to turn the run into one of predict, without labels.
        entry: Values of the section's categories to replace.
    """
    rows = list(read_csv(folder / "scores.csv"))
    for row in rows:
        if row.get("error"):
            continue
        above = float(row["image_score"]) - thresholds[row["category"]]
        row["label"] = "" if predict else row["label"]
        row["p_value"] = str(0.05 if above > 0 else round(min(1.0, 0.1 - above), 3))
        row["decision"] = "anomalous" if above > 0 else "normal"
    header = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "scores.csv", header, [[row.get(n, "") for n in header] for row in rows])
    content = json.loads((folder / "metrics.json").read_text())
    if predict:
        (folder / "metrics.json").unlink()
        (folder / "curves.json").unlink()
        content = {"run": content["run"]}
    scored = [row for row in rows if not row.get("error")]
    content["decisions"] = {
        "alpha": 0.05,
        "confidence": None,
        "fdr": None,
        "source": "last.ckpt",
        "categories": {
            name: {
                "num_images": sum(row["category"] == name for row in scored),
                "num_anomalous": sum(
                    row["category"] == name and row["decision"] == "anomalous" for row in scored
                ),
                **{"n": 19, "k": 1, "threshold": threshold, "map_threshold": 0.5},
                **{"average": 0.05, "guaranteed": 0.146, "as_asked": True, "kind": "split"},
                "sentence": SENTENCE,
                "normal_with_marked_pixels": 0,
                "drift": {"alarm": False, "largest": 3.2, "at": None},
                **entry,
            }
            for name, threshold in thresholds.items()
        },
    }
    write_json(folder / ("predict.json" if predict else "metrics.json"), content)
    return folder


THRESHOLDS = {"cap": 0.25, "nut": 3.5}


def text_of(run: Path) -> str:
    """Return the visible text of a run's page."""
    write_page(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    html = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))


def folders_on(page: Path, *folders: Path) -> list[str]:
    """Return which of some folders, the home folder and the working folder a page names."""
    html = page.read_text(encoding="utf-8")
    return [
        str(f) for f in (*folders, Path.home(), Path.cwd()) if f"{f}/" in html or f"{f}<" in html
    ]


def embedded(run: Path, element: str) -> Any:
    write_page(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    (content,) = re.findall(rf'id="{element}">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(content)


def numbers(text: str) -> list[float]:
    return np.frombuffer(base64.b64decode(text), "<f4").tolist()


def add_unreadable(run: Path) -> Path:
    rows = [[*row.values(), ""] for row in read_csv(run / "scores.csv")]
    rows.insert(1, ["cap/lost.png", "cap", "", "", "the image cannot be decoded"])
    write_csv(run / "scores.csv", ["path", "category", "label", "image_score", "error"], rows)
    return run
