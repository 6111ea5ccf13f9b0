"""Decoded and resized images on disk, so that later epochs decode nothing.

An image is stored as a small ``.npy`` file of uint8, which is memory-mapped when it is read. The
file name is a hash of the source file's content and of the processing. A changed image therefore
gets a new file, and an image that is in two data sets or two listings is stored once. Files are
written atomically, so any number of data loader workers may share one folder, and an interruption
leaves no incomplete file. The folder may be deleted at any time.
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

VERSION = 1  # increase it when reading or resizing returns different values


class ImageCache:
    """Cache of arrays that are computed from image files.

    Args:
        tag: Everything that the arrays depend on besides the image files and the ``variant``.
        folder: The folder of the arrays; default: a subfolder of the cache folder.
    """

    def __init__(self, tag: str = "", folder: Path | None = None) -> None:
        self.tag = tag
        self.folder = folder or cache_folder() / "pictures"
        self.hashes = FileHashes()
        self._writable = True

    def load(self, sources: Sequence[Path], variant: str) -> NDArray[np.uint8] | None:
        """Return a copy of the stored array; None if it is missing or damaged."""
        try:
            return np.array(
                np.load(self._file(sources, variant), mmap_mode="r", allow_pickle=False)
            )
        except (OSError, ValueError, EOFError):  # missing or damaged: computed again
            return None

    def store(
        self,
        sources: Sequence[Path],
        variant: str,
        array: NDArray[np.uint8] | NDArray[np.bool_],
    ) -> None:
        """Store an array; if the disk is full or read-only, warn once and store nothing more."""
        if not self._writable:
            return
        file = self._file(sources, variant)
        try:
            with atomic_path(file) as temporary:
                np.save(temporary, array.astype(np.uint8, copy=False), allow_pickle=False)
        except OSError as error:
            self._writable = False
            warnings.warn(f"images are not cached in {self.folder}: {error}", stacklevel=2)

    def _file(self, sources: Sequence[Path], variant: str) -> Path:
        contents = " ".join(self.hashes.sha256(path) for path in sources)
        key = f"{VERSION} {contents} {variant} {self.tag}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npy"
