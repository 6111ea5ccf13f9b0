"""Files of the caches: each carries a checksum of its content and the identity of what made it.

The last 36 bytes of a file are a mark, the CRC-32 of the content, and the first half of the SHA-256
of the identity. A file that was cut or changed, belongs to something else, or has no such end is
not used, and whoever asked for it makes it again. The checksum finds the faults of disks and
copies; whoever may write into the folder can forge it.

A cache is never necessary. If its folder is full, read-only or gone, a run continues without
it, after one warning.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from anomaly_clip.files import CACHE_VARIABLE, atomic_path, cache_folder

__all__ = ["forget_warnings", "is_cached", "read_cached", "warn_of_cache", "write_cached"]

MARK = b"anomaly_clip 1: "
CRC_BYTES, IDENTITY_BYTES = 4, 16
END_BYTES = len(MARK) + CRC_BYTES + IDENTITY_BYTES
BLOCK = 1 << 20

_warned = mmap.mmap(-1, mmap.PAGESIZE)
"""1 at the place of a folder with a warning; shared with worker processes that are forked."""


def write_cached(file: Path, identity: str, content: bytes) -> None:
    """Write a file of a cache atomically, with its checksum.

    Args:
        file: The file. An empty folder in its place is removed.
        identity: Everything that the content depends on.
        content: The content.

    Raises:
        OSError: If the file cannot be written.
    """
    with suppress(OSError):
        file.rmdir()
    with atomic_path(file) as temporary:
        temporary.write_bytes(content + _end(zlib.crc32(content), identity))


def read_cached(file: Path, identity: str) -> bytes | None:
    """Return the content of a file of a cache; None if it is missing, damaged or another one.

    Args:
        file: The file.
        identity: The identity that the file was written with.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anomaly_clip.cache_files import read_cached, write_cached
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "a")
        ...     write_cached(file, "of a", b"content")
        ...     read_cached(file, "of a"), read_cached(file, "of b")
        (b'content', None)
    """
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    content, end = stored[:-END_BYTES], stored[-END_BYTES:]
    return content if end == _end(zlib.crc32(content), identity) else None


def is_cached(file: Path, identity: str) -> bool:
    """Return whether :func:`read_cached` would return the content; it is read in blocks."""
    try:
        left, checksum = file.stat().st_size - END_BYTES, 0
        if left < 0:
            return False
        with file.open("rb") as opened:
            while left > 0 and (block := opened.read(min(BLOCK, left))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
            return left == 0 and opened.read() == _end(checksum, identity)
    except OSError:
        return False


def warn_of_cache(folder: Path, error: OSError) -> None:
    """Warn that a cache cannot be used; once a run, whatever is cached.

    Args:
        folder: The folder of the cache.
        error: The reason.
    """
    root = cache_folder()
    folder = root if folder.is_relative_to(root) else folder
    slot = zlib.crc32(str(folder).encode("utf-8", "surrogatepass")) % len(_warned)
    is_first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    if _warned[slot] or not is_first_process:
        return
    _warned[slot] = 1
    warnings.warn(
        f"the cache folder {folder} cannot be used ({error.strerror or error}), so its content is "
        f"computed again, which only costs time: free space there, or point {CACHE_VARIABLE} at "
        f"another folder",
        stacklevel=3,
    )


def forget_warnings() -> None:
    """Let :func:`warn_of_cache` warn again, because a new run begins."""
    _warned[:] = bytes(len(_warned))


def _end(checksum: int, identity: str) -> bytes:
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:IDENTITY_BYTES]
    return MARK + checksum.to_bytes(CRC_BYTES, "little") + digest
