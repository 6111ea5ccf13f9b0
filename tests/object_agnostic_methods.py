"""AnomalyCLIP as in the golden arrays, and small ones to be fitted in tests."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from helpers import TINY_CLIP, Golden

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods import AnomalyCLIP

DEEP_CLIP: dict[str, Any] = deepcopy(TINY_CLIP)
"""Configuration of a CLIP that is fast to build, whose text tower has room for deep prompts."""
DEEP_CLIP["text_cfg"]["layers"] = 3


def golden_tower(arrays: Golden) -> CLIPBackbone:
    """Return the CLIP that produced the golden arrays."""
    return CLIPBackbone(
        str(arrays.folder / "model_config.json"),
        str(arrays.folder / "state_dict.safetensors"),
        arrays.meta["image_size"],
        positions="bilinear",
    )


def golden_method(arrays: Golden, tower: CLIPBackbone, **options: Any) -> AnomalyCLIP:
    """Return AnomalyCLIP with the golden prompts and settings."""
    meta = arrays.meta
    options = {
        "layers": meta["layers"],
        "dense_blocks": meta["dpam_layer"] - 1,
        "sigma": meta["sigma"],
        "temperature": meta["temperature"],
        "prompts_file": str(arrays.folder / "checkpoint.pth"),
        **options,
    }
    return AnomalyCLIP(tower, **options).eval()


def write_config(file: Path, configuration: dict[str, Any] = DEEP_CLIP) -> str:
    """Write the configuration of a CLIP, and return the path as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(configuration), encoding="utf-8")
    return str(file)


def command(root: Path, auxiliary: Path, clip: str, runs: Path, verb: str = "fit") -> list[str]:
    """Return a command line of AnomalyCLIP; the auxiliary set has VisA's layout."""
    words = [verb, "--model", "AnomalyCLIP", "--model.backbone.name", clip, "--model.lr", "0.01"]
    words += ["--model.backbone.pretrained", "random", "--model.backbone.image_size", "32"]
    words += ["--model.sigma", "2"]
    words += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    words += ["--data.auxiliary", "VisA", "--data.auxiliary.root", str(auxiliary)]
    words += ["--trainer.accelerator", "cpu", "--output.root", str(runs)]
    return [*words, "--trainer.log_every_n_steps", "1"]
