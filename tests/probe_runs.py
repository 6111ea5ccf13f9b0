"""Runs of the linear probe on tiny wafer maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def wafers(folder: Path, copies: int = 10, extra: int = 0) -> Path:
    """Write a file in the published layout, with four classes that are easy to tell apart.

    A map has failing dies in the area of its pattern and at random places elsewhere. ``extra`` is
    the number of further maps, which belong to a fifth class.
    """
    rng = np.random.default_rng(9)
    rows = np.zeros((4, 8), int)
    rows[1, 0] = rows[2, 3] = rows[3, 0] = rows[3, 3] = 1
    targets = np.repeat(rows, copies, axis=0)
    if extra:
        more = np.zeros((extra, 8), int)
        more[:, 5] = 1
        targets = np.concatenate([targets, more])
    maps = np.where(rng.random((len(targets), 52, 52)) < 0.1, 2, 1)
    maps[targets[:, 0] == 1, 16:36, 16:36] = 2
    maps[targets[:, 3] == 1, :6] = 0
    maps[targets[:, 3] == 1, -6:] = 2
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "MixedWM38.npz", maps, targets)
    return folder


def words(root: Path, runs: Path, *more: str, verb: str = "fit", epochs: int = 3) -> list[str]:
    line = [verb, "--model", "LinearProbe", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "32", "--data", "MixedWM38", "--data.root", str(root)]
    line += ["--data.num_workers", "0", "--data.batch_size", "16", "--trainer.accelerator", "cpu"]
    line += ["--trainer.log_every_n_steps", "1", "--trainer.max_epochs", str(epochs)]
    return [*line, "--output.root", str(runs), "--trainer.enable_model_summary", "false", *more]


def fitted(runs: Path, number: int = 1) -> Path:
    return runs / "LinearProbe" / f"{number}-fit" / "checkpoints" / "last.ckpt"


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(checkpoint, weights_only=True)["state_dict"])
