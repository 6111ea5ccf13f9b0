"""Messages of libraries that tell a user nothing."""

from __future__ import annotations

import logging
import os
import warnings

import rich

__all__ = ["quieten"]


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
