"""``anomaly_clip export``: write the weights of a checkpoint in the form that others load."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomaly_clip.commands.experiment import class_of_checkpoint, quieten
from anomaly_clip.errors import UserError, reason, user_errors
from anomaly_clip.methods.evaluated import Exporter

__all__ = ["run_export"]


def run_export(words: Sequence[str]) -> int:
    """Export and return an exit code.

    Raises:
        UserError: What is wrong, and the way out.
    """
    parser = argparse.ArgumentParser(
        prog="anomaly_clip export",
        description="Write the weights of a checkpoint in the form that others load: of TAB a "
        "torchvision ResNet (.safetensors and .pt), of SDP+ the authors' linear layers.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="of a fit")
    parser.add_argument("--folder", type=Path, help="where to; default: the current folder")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(list(words[1:]))
    quieten()
    kind = class_of_checkpoint(options.ckpt_path)
    if not hasattr(kind, "export"):
        raise UserError(f"--ckpt_path {options.ckpt_path}: {kind.__name__} has nothing to export")
    with user_errors():
        try:
            method: Any = kind.load_from_checkpoint(options.ckpt_path, map_location="cpu")
        except (KeyError, RuntimeError) as error:
            raise UserError(f"--ckpt_path {options.ckpt_path}: {reason(error)}") from None
    assert isinstance(method, Exporter)
    target = options.folder or Path()
    with tempfile.TemporaryDirectory() as scratch:
        name = method.export(Path(scratch)).name
        files = sorted(Path(scratch).iterdir())
        there = [file.name for file in files if (target / file.name).exists()]
        if there and not options.overwrite:
            raise UserError(f"{target / there[0]} exists: give another --folder, or --overwrite")
        method.export(target)
    print(target / name)
    return 0
