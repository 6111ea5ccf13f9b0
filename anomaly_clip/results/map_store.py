"""Anomaly maps stored on disk during a run and drawn at its end.

All maps of a category are drawn on a common scale, which is only known at the end of the run.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.files import atomic_path, name_key, safe_name
from anomaly_clip.records import Scores
from anomaly_clip.results.folder import claim_scratch

if TYPE_CHECKING:
    from torch import Tensor

    from anomaly_clip.data.samples import Sample

__all__ = ["MapStore", "Ranges", "Rows", "image_names", "merge_ranges", "resize_map"]

Rows = dict[int, dict[str, Any]]
"""Path, category, label and scores of each image, by index."""
Ranges = dict[str, list[float]]
"""Lowest and highest value of the maps of each category."""

SUFFIXES = (".png", ".npy", ".webp")
"""Suffixes of the files that are named by :func:`image_names`."""


class MapStore:
    """Anomaly maps of one process, in a scratch folder.

    Args:
        folder: Scratch folder shared by all processes of a run; each stores different images.
        with_stages: Whether to store the maps of a method's intermediate steps too.
        longest: Longest side in pixels to which larger maps are shrunk; None: no shrinking.
    """

    def __init__(self, folder: Path, with_stages: bool = False, longest: int | None = None) -> None:
        self.folder = folder
        self.with_stages = with_stages
        self.longest = longest
        self.ranges: Ranges = {}
        self.indices: list[int] = []

    def __contains__(self, index: object) -> bool:
        """Return whether the map of an image was stored, by this process or another."""
        return isinstance(index, int) and self._file(index).is_file()

    def keep(self, scores: Scores, indices: Sequence[int], categories: Sequence[str]) -> None:
        """Store the maps of a batch, if there are any."""
        if "anomaly_map" not in scores:
            return
        final = scores["anomaly_map"].float()
        named = {"map": final}
        if self.with_stages:
            from anomaly_clip.maps import resize_maps  # not for the readers of runs

            size = (final.shape[-2], final.shape[-1])
            stages = scores.get("stage_maps", {})
            named |= {name: resize_maps(maps.float(), size) for name, maps in stages.items()}
        lowest, highest = (bounds.tolist() for bounds in final.flatten(1).aminmax(dim=1))
        arrays = {name: self._shrunk(maps).cpu().numpy() for name, maps in named.items()}
        claim_scratch(self.folder)
        for row, (index, category) in enumerate(zip(indices, categories, strict=True)):
            widen(self.ranges, category, lowest[row], highest[row])
            with atomic_path(self._file(index)) as temporary, temporary.open("wb") as file:
                np.savez(file, **{name: maps[row] for name, maps in arrays.items()})
            self.indices.append(index)

    def load(self, index: int) -> dict[str, NDArray]:
        """Load the maps of an image by name, the final ``map`` first."""
        with np.load(self._file(index)) as file:
            return {name: file[name] for name in file.files}

    def clear(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shrunk(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        if self.longest is None or max(height, width) <= self.longest:
            return maps
        from anomaly_clip.maps import resize_maps

        shrink = self.longest / max(height, width)
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        return resize_maps(maps, size)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.npz"


def resize_map(values: NDArray, size: tuple[int, int]) -> NDArray:
    """Resize a map ``(h, w)`` to another height and width; see :func:`maps.resize_maps`."""
    import torch

    from anomaly_clip.maps import resize_maps

    resized: NDArray = resize_maps(torch.from_numpy(values)[None], size)[0].numpy()
    return resized


def widen(ranges: Ranges, category: str, low: float, high: float) -> None:
    """Extend the range of a category to include two more values."""
    bounds = ranges.setdefault(category, [low, high])
    bounds[:] = [min(bounds[0], low), max(bounds[1], high)]


def merge_ranges(parts: Sequence[Mapping[str, Sequence[float]]]) -> Ranges:
    """Merge the ranges of all processes."""
    ranges: Ranges = {}
    for part in parts:
        for category, (low, high) in part.items():
            widen(ranges, category, low, high)
    return ranges


def image_names(samples: Sequence[Sample]) -> list[str]:
    """Return ``category/defect/stem`` for each sample, with the index appended to duplicates.

    Every part is a valid file name that leaves room for a suffix; see
    :func:`~anomaly_clip.files.safe_name`. Names are also distinct on disks that ignore case.

    Example:
        >>> from pathlib import Path
        >>> from anomaly_clip.data import Sample
        >>> from anomaly_clip.results.map_store import image_names
        >>> image_names([Sample(Path("a/1.png"), "nut/bolt", True, defect="cut")])
        ['nut_bolt/cut/1']
        >>> image_names([Sample(Path("1.png"), "..", False)])
        ['_/good/1']
    """
    parts = [[s.category.replace("/", "_"), *s.defect.split("/"), s.image.stem] for s in samples]
    names = ["/".join(safe_name(p) for p in part if p) for part in parts]
    keys = [name_key(name).casefold() for name in names]
    folders = {folder for key in set(keys) for folder in _folders_of(key)}
    seen = Counter(keys)
    clashes = [seen[k] > 1 or any(f"{k}{suffix}" in folders for suffix in SUFFIXES) for k in keys]
    taken = {key for key, clash in zip(keys, clashes, strict=True) if not clash}
    for index, clash in enumerate(clashes):
        if clash:
            name = names[index] = _free_name(f"{names[index]}-{index}", taken)
            taken.add(name_key(name).casefold())
    return names


def _folders_of(name: str) -> list[str]:
    """Return the folders of ``a/b/c``: ``a`` and ``a/b``."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _free_name(name: str, taken: set[str]) -> str:
    while name_key(name).casefold() in taken:  # an image of that name exists
        name += "-"
    return name
