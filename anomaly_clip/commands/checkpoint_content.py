"""Content of a checkpoint, checked before it is used: a file may be damaged, or of something else.

A checkpoint names the class that wrote it. A name in a file is no reason to run code: the class has
to be of this package, or imported by the caller already.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from anomaly_clip.backbones.weight_files import WeightFileError, read_content
from anomaly_clip.errors import UserError, reaches_users_code, reason
from anomaly_clip.files import printable

__all__ = ["DAMAGE", "damage_explained", "method_class", "read_checkpoint"]

PACKAGE = "anomaly_clip."
WRITTEN_BY_FIT = "give one that fit has written"
KINDS: Mapping[str, tuple[type, str]] = {
    "state_dict": (Mapping, "a mapping"),
    "hyper_parameters": (Mapping, "a mapping"),
    "loops": (Mapping, "a mapping"),
    "callbacks": (Mapping, "a mapping"),
    "optimizer_states": (list, "a list"),
    "lr_schedulers": (list, "a list"),
    "backbone": (Mapping, "a mapping"),
    "fitted_images": (list, "a list"),
    "preprocessing": (Mapping, "a mapping"),
    "epoch": (int, "a number"),
    "global_step": (int, "a number"),
    "pytorch-lightning_version": (str, "a text"),
}
"""Kinds of the entries that Lightning and the methods write."""
LOADERS = ("checkpoint_connector.py", "migrate.py")  # modules of Lightning
DAMAGE = (KeyError, IndexError, TypeError, AttributeError, RuntimeError)
"""Exceptions of the code that reads a damaged checkpoint."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code in it, and check the kinds of its entries.

    Args:
        path: An existing file.

    Raises:
        UserError: If it is not a checkpoint, or is damaged.
    """
    try:
        checkpoint = read_content(path).content
    except WeightFileError as error:
        raise UserError(
            f"--ckpt_path {path}: not a checkpoint that can be read safely ({error.form}): "
            f"{WRITTEN_BY_FIT}"
        ) from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"--ckpt_path {path}: not a checkpoint of a fit, as it has no state_dict: "
            f"{WRITTEN_BY_FIT}"
        )
    for key, (kind, name) in KINDS.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            got = type(checkpoint[key]).__name__
            raise _damaged(path, f"{key} is not {name}, but {got}")
    parts = ("state_dict", "hyper_parameters")
    odd = [k for part in parts for k in checkpoint.get(part, {}) if not isinstance(k, str)]
    if odd:
        raise _damaged(path, f"it has the name {odd[0]!r}, not a text")
    class_path = checkpoint.get("hyper_parameters", {}).get("_class_path", "")
    if not isinstance(class_path, str):
        raise _damaged(path, f"_class_path is not a text, but {type(class_path).__name__}")
    progress = checkpoint.get("loops", {})
    for name in ("fit_loop", "epoch_progress", "current"):
        progress = progress.get(name, {})
        if not isinstance(progress, Mapping):
            raise _damaged(path, f"{name} in loops is not a mapping, but {type(progress).__name__}")
    return checkpoint


def method_class(name: object, path: Path, source: str) -> type[LightningModule]:
    """Return a class of this package, or one whose module the caller has imported.

    Args:
        name: The dotted name of the class.
        path: The checkpoint, for messages.
        source: Place of the name, such as ``its _class_path``.

    Raises:
        UserError: If there is no such class, it is no method, or its module is not imported.
    """
    start = f"--ckpt_path {path}: {source} is {printable(str(name))[:200]}"
    module, _, last = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not f"{module}.".startswith(PACKAGE) and module not in sys.modules:
        raise UserError(
            f"{start}, outside this package, and a name in a file imports no code: import the "
            f"class in Python, and call its load_from_checkpoint"
        )
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{start}, which this version does not have: {WRITTEN_BY_FIT}") from None
    if not isinstance(kind, type) or not issubclass(kind, LightningModule):
        raise UserError(f"{start}, which is no method: {WRITTEN_BY_FIT}")
    return kind


@contextmanager
def damage_explained(path: str | Path | None, model: LightningModule | None) -> Iterator[None]:
    """Explain exceptions that a checkpoint causes while it is loaded into a model.

    Args:
        path: The checkpoint; None if there is none.
        model: The model; None while only the settings in the checkpoint are read.

    Raises:
        UserError: In place of the exception. Those of a user's own code keep their traceback.
    """
    try:
        yield
    except DAMAGE as error:
        if path is None or (model is not None and not _from_loading(error, model)):
            raise
        name = "its settings" if model is None else type(model).__name__
        raise UserError(
            f"--ckpt_path {path}: the checkpoint does not fit {name}, or is damaged "
            f"({type(error).__name__}: {_first_difference(error)}): {WRITTEN_BY_FIT}"
        ) from error


def _first_difference(error: BaseException) -> str:
    """Return what an exception tells of a checkpoint: of torch's list of tensors, the first."""
    lines = str(error).strip().splitlines()
    is_list = len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict")
    return (lines[1].strip() if is_list else reason(error))[:200].rstrip(" .:;")


def _from_loading(error: BaseException, model: LightningModule) -> bool:
    """Return whether an exception was raised while Lightning loaded a checkpoint."""
    is_ours = type(model).__module__.startswith(PACKAGE)
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name in LOADERS:
            return is_ours or not reaches_users_code(trace)
        trace = trace.tb_next
    return False


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"--ckpt_path {path}: a damaged checkpoint, as {problem}: {WRITTEN_BY_FIT}")
