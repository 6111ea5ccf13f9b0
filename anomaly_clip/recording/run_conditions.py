"""Conditions of a run: its first line, and what a paper must state and no other part records."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.files import printable
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule, data_module
from anomaly_clip.records import source_of

__all__ = ["CONVENTIONS", "environment", "evaluation_conditions", "file_sha256", "start_line"]

CONVENTIONS = {
    "average": "unweighted mean over categories",
    "pixels": "all pixels of all test images of a category, normal images included",
    "regions": "8-connected components of the masks",
}
"""Conventions of a detector's metrics; docs/metrics.md explains them."""


def evaluation_conditions(method: EvaluatedModule, data: AnomalyData) -> dict[str, Any]:
    """Return entries of the protocol: folder of the data, reading of masks, form of the metrics.

    ``fitted_images`` is the number of different images of the fit. It is None for a method without
    a fit, and absent if the checkpoint does not have it.
    """
    conditions: dict[str, Any] = {"root": str(data.root)}
    if isinstance(method, AnomalyMethod):
        rule = data.mask_rule
        grey = "the grey value is the defect's strength" if rule.grey else None
        conditions |= {
            "mask_values": grey or f"values above {rule.level} are defects",
            "evaluator": asdict(method.evaluator_settings),
            "conventions": CONVENTIONS,
        }
        if method.fitted_images or not method.can_be_fitted:
            conditions["fitted_images"] = len(method.fitted_images) or None
    return conditions


def environment(trainer: Trainer) -> dict[str, Any]:
    """Return device, precision, number of processes and of threads, and the checkpoint's hash."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
    return {
        "device": name,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "checkpoint_sha256": None if checkpoint is None else file_sha256(checkpoint),
    }


def file_sha256(file: Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read, such as after its removal."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def start_line(
    module: LightningModule, stage: str, sources: str, seed: int | None, folder: Path
) -> str:
    """Return the first line of a run: method, configuration, data, weights, seed and folder.

    Args:
        module: The method.
        stage: Stage of the trainer, such as ``fit``.
        sources: Source of the configuration.
        seed: Seed of the run; None without one.
        folder: The run's folder.
    """
    parts = [f"{stage} {type(module).__name__}", sources]
    data = data_module(module)
    if data is not None:
        parts.append(f"{data.dataset_name} {data.root}: {data.summary(stage)}")
    if isinstance(module, EvaluatedModule):
        weights = module.weights
        source = source_of({**weights, "pretrained": "RANDOM"} if weights["random"] else weights)
        parts.append(f"{weights['backbone']} with weights {source}")
    parts.append("no seed" if seed is None else f"seed {seed}")
    parts.append(f"run {folder}")
    return printable(" | ".join(parts))
