"""``anomaly_clip export``: write the weights of a checkpoint in a format other programs load."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError

from anomaly_clip.commands.checkpoint_content import DAMAGE
from anomaly_clip.commands.checkpoint_option import (
    checkpoint_file,
    config_of_fit,
    is_last,
    last_of_runs,
)
from anomaly_clip.commands.experiment import RUNS, class_of_checkpoint
from anomaly_clip.commands.foreign_code import seed_in_config
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.errors import UserError, reason, user_errors
from anomaly_clip.methods.evaluated import Exporter

__all__ = ["run_export"]


def run_export(words: Sequence[str]) -> int:
    """Export a checkpoint and return an exit code.

    Raises:
        UserError: If the checkpoint cannot be exported, or a file already exists.
    """
    parser = argparse.ArgumentParser(
        prog="anomaly_clip export",
        description="Write the weights of a checkpoint in a format that other programs load: a "
        "torchvision ResNet for TAB (.safetensors and .pt), the authors' linear layers for SDP+, "
        "a CLIP with open_clip's names for Contrastive.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="checkpoint or folder of a fit, or last"
    )
    parser.add_argument("--folder", type=Path, help="output folder; default: the working directory")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args(list(words[1:]))
    value = str(options.ckpt_path)
    is_word = is_last(value)
    file = last_of_runs("export", RUNS, None, None) if is_word else checkpoint_file(value)
    options.ckpt_path = Path(file)
    quieten()
    kind = class_of_checkpoint(options.ckpt_path)
    if not hasattr(kind, "export"):
        raise UserError(
            f"--ckpt_path {options.ckpt_path}: {kind.__name__} has nothing to export: give a "
            "checkpoint of TAB, SDPPlus or Contrastive"
        )
    with user_errors(), torch.random.fork_rng(devices=[]):
        _seed_like_the_fit(options.ckpt_path)
        try:
            method: Any = kind.load_from_checkpoint(options.ckpt_path, map_location="cpu")
        except (*DAMAGE, ArgumentError) as error:
            if not kind.__module__.startswith("anomaly_clip."):
                raise
            cause = f"{type(error).__name__}: {reason(error).rstrip(' .:')}"
            raise UserError(
                f"--ckpt_path {options.ckpt_path}: the checkpoint does not fit {kind.__name__}, or "
                f"is damaged ({cause}): give one that fit has written"
            ) from None
    assert isinstance(method, Exporter)
    target = options.folder or Path()
    with tempfile.TemporaryDirectory() as scratch:
        name = method.export(Path(scratch)).name
        files = sorted(Path(scratch).iterdir())
        existing = [file.name for file in files if (target / file.name).exists()]
        if existing and not options.overwrite:
            raise UserError(
                f"{target / existing[0]} exists: give another --folder, or add --overwrite"
            )
        method.export(target)
    print(target / name)
    return 0


def _seed_like_the_fit(checkpoint: Path) -> None:
    """Seed torch as the fit did, so that a backbone of random weights is the one of the fit."""
    with contextlib.suppress(UserError):  # the configuration of a moved checkpoint is unknown
        seed = seed_in_config(config_of_fit(checkpoint))
        torch.manual_seed(0 if seed is None else seed)
