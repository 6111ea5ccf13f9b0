"""Content hashes of files; a file is hashed once per path, size and modification time.

The hashes are stored in the cache folder, one line per file, with a checksum. Lines are only ever
appended, so any number of processes may read and write them. A line that is damaged, or was cut
short by an interruption, is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray

from anomaly_clip import images
from anomaly_clip.cache_files import warn_of_cache
from anomaly_clip.files import cache_folder, source_hash
from anomaly_clip.images import MAX_PIXELS, pixel_bands, read_header
from anomaly_clip.progress import track

__all__ = [
    "DuplicatePair",
    "FileHashes",
    "duplicates_between",
    "equal_images",
    "hash_of_pixels",
    "pixel_hashes",
    "pixels_sha256",
    "readable_hashes",
]

BLOCK = 1 << 20

Hash = TypeVar("Hash", str, "str | None")


class FileHashes:
    """Cached content hashes of files.

    Args:
        file: The file that stores the hashes; default: a file in the cache folder.
        digest: Function that computes the hash of a file; default: SHA-256 of its bytes.
        version: Everything that the hashes depend on besides the bytes of the files.
    """

    def __init__(
        self,
        file: Path | None = None,
        digest: Callable[[Path], str] | None = None,
        version: str = "",
    ) -> None:
        self.file = file or cache_folder() / "contents.jsonl"
        self.version = version
        self._digest = digest or _sha256
        self._writable = True
        self._digests: dict[tuple[str, int, int], str] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_digests": None}  # each data loader worker reads the file

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's content, in hexadecimal digits.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read.
        """
        try:
            stat = path.stat()
            key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
            digests = self._load()
            if key not in digests:
                digests[key] = self._digest(path)
                self._append(key, digests[key])
            return digests[key]
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: there is no such file; correct the path, or restore the file"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{path}: the file cannot be read ({error.strerror}); check the path and its "
                f"permissions"
            ) from None

    def sha256_of_all(self, paths: Iterable[Path], workers: int | None = None) -> dict[Path, str]:
        """Return the hashes of many files, read by several threads."""
        return self._of_all(self.sha256, paths, "comparing files", workers)

    def of_readable(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Return the hashes of the files among ``paths`` that can be read."""

        def hash_or_none(path: Path) -> str | None:
            try:
                return self.sha256(path)
            except (OSError, ValueError):  # reported when the image is used
                return None

        every = self._of_all(hash_or_none, paths, "comparing images")
        return {path: digest for path, digest in every.items() if digest is not None}

    def _of_all(
        self,
        function: Callable[[Path], Hash],
        paths: Iterable[Path],
        title: str,
        workers: int | None = None,
    ) -> dict[Path, Hash]:
        paths = list(dict.fromkeys(paths))
        self._load()
        with ThreadPoolExecutor(workers) as pool:
            digests = track(pool.map(function, paths), title, total=len(paths))
            return dict(zip(paths, digests, strict=True))

    def _load(self) -> dict[tuple[str, int, int], str]:
        if self._digests is None:
            self._digests = {}
            try:
                lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                lines = []
            for line in lines:
                try:
                    path, size, modified, digest, checksum = json.loads(line)
                    if checksum == self._checksum((path, size, modified), digest):
                        self._digests[path, size, modified] = digest
                except (ValueError, TypeError, RecursionError):
                    continue
        return self._digests

    def _checksum(self, key: tuple[str, int, int], digest: str) -> int:
        return zlib.crc32(json.dumps([*key, digest, self.version]).encode())

    def _append(self, key: tuple[str, int, int], digest: str) -> None:
        if not self._writable:
            return
        line = json.dumps([*key, digest, self._checksum(key, digest)]) + "\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # A single write in append mode keeps the lines of several processes apart.
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:  # files are hashed again
            self._writable = False
            warn_of_cache(self.file.parent, error)


class DuplicatePair(NamedTuple):
    """Two files with the same content."""

    first: Path
    second: Path


def pixel_hashes(paths: Iterable[Path], max_pixels: int = MAX_PIXELS) -> dict[Path, str]:
    """Return hashes of the decoded pixels of images, which a lossless copy does not change.

    Args:
        paths: The images.
        max_pixels: Largest number of pixels of an image.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If an image cannot be decoded.
    """
    return _pixel_hashes(max_pixels).sha256_of_all(paths)


def readable_hashes(paths: Iterable[Path], max_pixels: int = MAX_PIXELS) -> dict[Path, str]:
    """Return :func:`pixel_hashes` of those images that can be decoded."""
    return _pixel_hashes(max_pixels).of_readable(paths)


def equal_images(
    first: Sequence[Path], second: Sequence[Path], max_pixels: int = MAX_PIXELS
) -> list[DuplicatePair]:
    """Return the images of ``second`` whose decoded pixels occur in ``first``, each at most once.

    A copy that was saved again without loss is equal, in any format. Only images whose width and
    height occur in both lists are decoded; unreadable ones are compared by the content of their
    files.

    Args:
        first: Images.
        second: Other images.
        max_pixels: Largest number of pixels of an image.
    """
    by_file = {pair.second: pair.first for pair in duplicates_between(first, second)}
    sizes = {path: _image_size(path) for path in (*first, *second)}
    common = {sizes[p] for p in first} & {sizes[p] for p in second if p not in by_file} - {None}
    compared = [*first, *(path for path in second if path not in by_file)]
    readable = (path for path in compared if sizes[path] in common)
    hashes = _pixel_hashes(max_pixels).of_readable(readable)
    by_pixels = {hashes[path]: path for path in reversed(first) if path in hashes}
    pairs = []
    for path in dict.fromkeys(second):
        match = by_file.get(path) or by_pixels.get(hashes.get(path, ""))
        if match is not None:
            pairs.append(DuplicatePair(match, path))
    return pairs


def hash_of_pixels(pixels: NDArray[np.uint8]) -> str:
    """Return the hash of a decoded image ``(H, W, 3)`` with 8 bits per channel."""
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def pixels_sha256(path: Path, max_pixels: int = MAX_PIXELS) -> str:
    """Return the hash of the decoded pixels of an image; stored values if they have 16 bits.

    Raises:
        FileNotFoundError: If the image is missing.
        ValueError: If it cannot be decoded.
    """
    size = read_header(path).size
    digest = hashlib.sha256(str((size[1], size[0], 3)).encode())
    for rows in pixel_bands(path, max_pixels):
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _pixel_hashes(max_pixels: int) -> FileHashes:
    digest = partial(pixels_sha256, max_pixels=max_pixels)
    version = f"{source_hash(images.__file__)} {PIL.__version__}"
    return FileHashes(cache_folder() / "pixels.jsonl", digest, version)


def _image_size(path: Path) -> tuple[int, int] | None:
    try:
        return read_header(path).size
    except (OSError, ValueError):
        return None


def duplicates_between(
    first: Sequence[Path], second: Sequence[Path], hashes: FileHashes | None = None
) -> list[DuplicatePair]:
    """Return the files of ``second`` whose content occurs in ``first``, each at most once.

    Only files whose size occurs in both lists are hashed, because equal files have equal sizes.
    """
    hashes = hashes or FileHashes()
    sizes = {size for path in first if (size := _size(path)) is not None}
    candidates = [path for path in second if _size(path) in sizes]
    common_sizes = {_size(path) for path in candidates}
    ours = hashes.sha256_of_all(path for path in first if _size(path) in common_sizes)
    by_content = {digest: path for path, digest in reversed(list(ours.items()))}
    theirs = hashes.sha256_of_all(candidates)
    return [
        DuplicatePair(by_content[digest], path)
        for path, digest in theirs.items()
        if digest in by_content
    ]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # no file, such as a generated image
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
