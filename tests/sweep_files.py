"""Sweep files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.commands.sweep_file import ARGS

COMMAND = ["${env}", "anomaly_clip", "fit", "--model", "SDPPlus", "--data", "Demo", ARGS]
GOAL = {"name": "val/pixel_ap", "goal": "maximize"}
PLAIN: dict[str, Any] = {
    "program": "anomaly_clip",
    "method": "grid",
    "metric": GOAL,
    "parameters": {"model.lr": {"values": [0.1, 0.2]}},
    "command": COMMAND,
}


def write_sweep(folder: Path, **keys: Any) -> Path:
    """Write a sweep file, with some keys replaced; None removes a key."""
    content = {key: value for key, value in {**PLAIN, **keys}.items() if value is not None}
    file = folder / "my_sweep.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file
