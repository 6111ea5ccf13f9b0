"""Atomic writing of files, safe file names, and the cache folder."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "CACHE_VARIABLE",
    "atomic_path",
    "cache_folder",
    "safe_name",
    "source_hash",
    "write_csv",
    "write_json",
]

CACHE_VARIABLE = "ANOMALY_CLIP_CACHE"


def cache_folder() -> Path:
    """Return the cache folder: ``$ANOMALY_CLIP_CACHE``, or by default the user's cache directory.

    The folder can be deleted at any time, because all of its content can be regenerated.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "anomaly_clip"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path``, or remove it on an error.

    Readers and other writers of the path see either the old or the new content, never a mixture.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from anomaly_clip.files import atomic_path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers derive the format from it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if (
            error.errno is not None and error.filename is None
        ):  # the error of a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and infinities raise a ``ValueError``."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically; None becomes an empty cell."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)


def safe_name(text: str) -> str:
    """Convert any text to a file name that is valid on every file system, not a path."""
    return re.sub(r'[\\/:*?"<>|]', "_", text).strip(" .") or "_"


def source_hash(*files: str) -> str:
    """Return a hash of source files, so that changes of the code invalidate cached values.

    Args:
        files: ``__file__`` of each module that the values depend on.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
