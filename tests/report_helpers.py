"""Helpers to write folders of finished runs, and to read the tables of ``report``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.cli import main
from anomaly_clip.data.info import DATASETS
from anomaly_clip.reporting.published_comparison import compare_with_published
from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.reporting.table import ReportTable, TableLine
from anomaly_clip.results.run_reader import find_runs

MVTEC = tuple(DATASETS["MVTecAD"].counts)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
Metrics = Mapping[str, float | None]
Writer = Callable[..., Path]


def metrics(image: float | None, pixel: float | None = 0.5) -> Metrics:
    return {"image_auroc": image, "image_ap": image, "pixel_auroc": pixel, "pixel_pro": None}


def run_writer(root: Path) -> Writer:
    """Return a function that writes a finished run, by default of PaDiM as in Table 1 of TAB."""

    def write(
        name: str = "padim",
        categories: Mapping[str, Metrics] | None = None,
        *,
        weights: str = "imagenet",
        method: str = "PaDiM",
        backbone: str = "resnet18",
        failed: Mapping[str, str] | None = None,
        **protocol: Any,
    ) -> Path:
        if categories is None:
            categories = {c: metrics(0.92 if c in TEXTURES else 0.86) for c in MVTEC}
        base = {"data": "MVTecAD", "image_size": 224, "complete": True}
        base["one_model_a_category"] = True
        run = {
            "method": method,
            "weights": {
                "backbone": backbone,
                "pretrained": weights,
                "random": weights == "random",
                "sha256": None,
            },
            "protocol": {**base, **protocol},
            "failed": failed or {},
        }
        folder = root / name
        folder.mkdir(parents=True)
        content = {"mean": {}, "categories": categories, "intervals": {}, "run": run}
        (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def lines_of(table: ReportTable, method: str) -> list[TableLine]:
    """Return the table lines of a method: the published line and those of our runs."""
    starts = [n for n, line in enumerate(table.lines) if line.cells[0].startswith(method)]
    (start,) = starts
    lines = [table.lines[start]]
    for line in table.lines[start + 1 :]:
        if line.first:
            break
        lines.append(line)
    return lines


def compared(table: str, *folders: Path) -> ReportTable:
    source = load_published()
    return compare_with_published(source.tables[table], find_runs(folders), source).table


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as content:
        return list(csv.DictReader(content))


def tab_export(folder: Path, **changes: Any) -> Path:
    """Write the files that a fit of TAB saves next to its weights; return the weights' path."""
    folder.mkdir()
    record = {
        "method": "TAB",
        "data": "MVTecAD",
        "backbone": {"name": "resnet18", "weights": "imagenet"},
        "text": {"name": "ViT-B-16", "pretrained": "laion400m_e32"},
        "loss": "align",
        "align": "both",
        "prompts": {"preset": "idpa", "centered": "no"},
    }
    (folder / "tab_resnet18.json").write_text(json.dumps({**record, **changes}))
    config = {"data": {"init_args": {"synthesis": {"recipe": "nsa"}}}}
    (folder / "config-fit.yaml").write_text(yaml.safe_dump(config))
    return folder / "tab_resnet18.safetensors"
