"""Reading and comparison of the files that runs of the contract leave."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["compare_checkpoints", "image_scores", "leaves", "load", "read_rows", "read_scores"]


def load(file: Path) -> dict[str, Any]:
    """Load a checkpoint without running code."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def compare_checkpoints(expected: Path, actual: Path) -> None:
    """Compare weights, optimisers, schedules and progress of two checkpoints to the bit.

    Raises:
        AssertionError: If they differ.
    """
    first, second = load(expected), load(actual)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        before, after = (dict(leaves(content.get(part), part)) for content in (first, second))
        assert list(before) == list(after), f"{part} has other entries"
        for key, value in before.items():
            same = value.equal(after[key]) if isinstance(value, Tensor) else value == after[key]
            assert same, f"{key} differs"


def read_scores(folder: Path) -> list[dict[str, str]]:
    """Return the rows of ``scores.csv``."""
    return read_rows(folder / "scores.csv")


def image_scores(folder: Path) -> NDArray[np.float64]:
    """Return the image scores in ``scores.csv``, in its order."""
    return np.array([float(row["image_score"]) for row in read_scores(folder)])


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield all values of nested containers with their paths."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{place}]")
    else:
        yield path, value
