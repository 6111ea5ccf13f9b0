"""Messages of libraries that tell a user nothing."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import rich
from lightning.pytorch.callbacks import ModelSummary

__all__ = ["quieten", "summary_options"]


def quieten() -> None:
    """Silence uninformative library messages; the start line of a run describes the run."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # caused by Lightning
    rich.reconfigure(stderr=True)  # Lightning's model summary; standard output is for results
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*validation_step. but have no .val_dataloader.*",  # most data sets have none
        ".*The dirpath has changed.*",  # a resumed fit gets a new run folder
        ".*module.s. in eval mode at the start of training.*",  # frozen backbones
        ".*smaller than the logging interval.*",  # small data sets
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of a deprecated name
    ):
        warnings.filterwarnings("ignore", message)


def summary_options(trainer: Mapping[str, Any], callbacks: Sequence[object]) -> dict[str, bool]:
    """Return the trainer's arguments that turn Lightning's model summary off, unless requested.

    It counts what is trained, and the modules of a frozen backbone, which tells little of a
    detector; the start line names the backbone.

    Args:
        trainer: Configuration of the trainer.
        callbacks: Callbacks of the trainer; a ``ModelSummary`` among them requests it.
    """
    is_open = trainer["enable_model_summary"] is None
    is_requested = any(isinstance(callback, ModelSummary) for callback in callbacks)
    return {"enable_model_summary": False} if is_open and not is_requested else {}
