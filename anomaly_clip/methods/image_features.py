"""Features of the images of a category, gathered from all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anomaly_clip.progress import say

__all__ = ["ImageFeatures", "check_count", "gather_rows", "names_of_all", "warn_of_few"]

INDEX = "index"
FEW = 5
"""Images of a category below which MuSc's published code returns NaN."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of some images of a category.

    Args:
        tensors: Features by name, ``(n, ...)`` each, on the CPU.
        index: int64 ``(n,)``, index of each image in its data set.
    """

    tensors: dict[str, Tensor]
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> ImageFeatures:
        """Return the features of some of the images."""
        return ImageFeatures({k: v[rows] for k, v in self.tensors.items()}, self.index[rows])

    def only(self, names: Sequence[str]) -> ImageFeatures:
        """Return some of the tensors."""
        return ImageFeatures({name: self.tensors[name] for name in names}, self.index)

    @classmethod
    def joined(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Return the features of all parts, of which there is at least one."""
        names = parts[0].tensors
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in names}
        return cls(tensors, torch.cat([part.index for part in parts]))

    @classmethod
    def collected(cls, parts: list[ImageFeatures]) -> ImageFeatures | None:
        """Return the features of all parts, which are emptied: both would fill the memory."""
        if not parts:
            return None
        index = torch.cat([part.index for part in parts])
        names = list(parts[0].tensors)
        return cls({name: torch.cat([p.tensors.pop(name) for p in parts]) for name in names}, index)

    @classmethod
    def gathered(cls, mine: ImageFeatures | None, device: torch.device) -> ImageFeatures | None:
        """Return the features of the images of all processes, in the order of their index.

        Args:
            mine: Images of this process; None without any.
            device: Device through which processes exchange tensors.
        """
        rows = {} if mine is None else {INDEX: mine.index, **mine.tensors}
        gathered = gather_rows(rows, device)
        if not gathered:
            return None
        index, order = gathered.pop(INDEX).sort()
        if not order.equal(torch.arange(len(order))):  # or a copy would only take memory
            for name in list(gathered):  # one after the other: all at once would take twice as much
                gathered[name] = gathered[name][order]
        return cls(gathered, index)

    def split(self, categories: Sequence[str]) -> Iterator[tuple[str, ImageFeatures]]:
        """Yield each category with its images, in the order of their first image.

        Args:
            categories: Category of each image.
        """
        for name in dict.fromkeys(categories):
            rows = torch.tensor([row for row, other in enumerate(categories) if other == name])
            yield name, self[rows]


def gather_rows(rows: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the rows of all processes, one after the other, on the CPU.

    Args:
        rows: Tensors ``(n, ...)`` by name; empty if this process has none.
        device: Device through which processes exchange tensors.
    """
    if _is_alone():
        return dict(rows)
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, {k: (v.shape, v.dtype) for k, v in rows.items()})
    form: dict[str, Any] = next((shape for shape in shapes if shape), {})
    gathered = {}
    for name, (shape, dtype) in form.items():
        counts = [part[name][0][0] if part else 0 for part in shapes]
        sent = torch.zeros(max(counts), *shape[1:], dtype=dtype, device=device)
        if rows:
            sent[: len(rows[name])] = rows[name].to(device)
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent)
        parts = [part[:count].cpu() for part, count in zip(received, counts, strict=True)]
        gathered[name] = torch.cat(parts)
    return gathered


def names_of_all(names: Sequence[str]) -> list[str]:
    """Return the names of all processes, each once, in the same order in each process."""
    gathered: list[Any] = [names]
    if not _is_alone():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, list(names))
    return list(dict.fromkeys(name for part in gathered for name in part))


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def check_count(n: int, category: str, method: str) -> None:
    """Check that there are images to compare.

    Raises:
        ValueError: If there is only one.
    """
    if n < 2:
        raise ValueError(
            f"{method} compares the images of a category with each other, but {category} has {n}: "
            f"give at least 2, better 20, images of the same thing"
        )


def warn_of_few(n: int, category: str, method: str) -> None:
    """Log a line if a category has few images."""
    if n < FEW:
        say(f"{method}: {category} has {n} images; scores of fewer than {FEW} are weak")
