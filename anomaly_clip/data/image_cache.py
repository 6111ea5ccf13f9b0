"""Decoded and resized pictures on disk, so that an epoch pays no decoding.

A picture is kept as a small ``.npy`` file of uint8, named by the content of its source and by what
was done to it, and is memory-mapped when it is read. A picture that changes gets another name, the
same picture in two data sets or two listings is kept once, and since files appear whole or not at
all, any number of loading processes may work on one folder and be interrupted. The folder may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.files import atomic_path, cache_folder

__all__ = ["ImageCache"]

VERSION = 1  # raise it when reading or resizing changes what it returns


class ImageCache:
    """Keeps arrays made of picture files.

    Args:
        tag: What else the arrays depend on.
        folder: Where they are kept; default: in the cache folder.
    """

    def __init__(self, tag: str = "", folder: Path | None = None) -> None:
        self.tag = tag
        self.folder = folder or cache_folder() / "pictures"
        self.hashes = FileHashes()
        self._writable = True

    def load(self, sources: Sequence[Path], variant: str) -> NDArray[np.uint8] | None:
        """Return what was stored, in memory of its own; None if nothing (whole) is there."""
        try:
            return np.array(
                np.load(self._file(sources, variant), mmap_mode="r", allow_pickle=False)
            )
        except (OSError, ValueError, EOFError):  # not there yet, or damaged: made again
            return None

    def store(
        self,
        sources: Sequence[Path],
        variant: str,
        array: NDArray[np.uint8] | NDArray[np.bool_],
    ) -> None:
        """Keep an array; a disk that is full or read-only is said once, and nothing is kept."""
        if not self._writable:
            return
        file = self._file(sources, variant)
        try:
            with atomic_path(file) as temporary:
                np.save(temporary, array.astype(np.uint8, copy=False), allow_pickle=False)
        except OSError as error:
            self._writable = False
            warnings.warn(f"pictures are not cached in {self.folder}: {error}", stacklevel=2)

    def _file(self, sources: Sequence[Path], variant: str) -> Path:
        contents = " ".join(self.hashes.sha256(path) for path in sources)
        key = f"{VERSION} {contents} {variant} {self.tag}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npy"
