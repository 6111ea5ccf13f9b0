"""Decoded and resized images on disk, so that later epochs decode nothing.

An image is stored as a small ``.npy`` file of uint8 with a checksum, see
:mod:`anomaly_clip.cache_files`. The
file name is a hash of the source file's content and of the processing. A changed image therefore
gets a new file, and an image that is in two data sets or two listings is stored once. Files are
written atomically, so any number of data loader workers may share one folder, and an interruption
leaves no incomplete file. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly_clip.cache_files import read_cached, warn_of_cache, write_cached
from anomaly_clip.data.file_hashes import FileHashes
from anomaly_clip.files import cache_folder

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

    def load(
        self, sources: Sequence[Path], variant: str, shape: tuple[int, ...]
    ) -> NDArray[np.uint8] | None:
        """Return the stored array, writable; None if it is missing, damaged or of another shape."""
        key = self._key(sources, variant)
        content = read_cached(self._file(key), key)
        if content is None:
            return None
        try:
            array: NDArray[np.uint8] = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError):
            return None
        return array if array.dtype == np.uint8 and array.shape == shape else None

    def store(
        self,
        sources: Sequence[Path],
        variant: str,
        array: NDArray[np.uint8] | NDArray[np.bool_],
    ) -> None:
        """Store an array; if the disk is full or read-only, warn once and store nothing more."""
        if not self._writable:
            return
        key = self._key(sources, variant)
        content = io.BytesIO()
        np.save(content, array.astype(np.uint8, copy=False), allow_pickle=False)
        try:
            write_cached(self._file(key), key, content.getvalue())
        except OSError as error:
            self._writable = False
            warn_of_cache(self.folder, error)

    def _key(self, sources: Sequence[Path], variant: str) -> str:
        contents = " ".join(self.hashes.sha256(path) for path in sources)
        return f"{VERSION} {contents} {variant} {self.tag}"

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npy"
