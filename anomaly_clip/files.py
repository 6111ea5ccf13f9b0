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
    """Return the cache folder: ``$ANOMALY_CLIP_CACHE``, else the user's cache directory.

    Everything in it can be made again; it may be deleted at any time.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "anomaly_clip"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, renamed to it at the end, removed after an error.

    Readers and other writers of the same path see the old content or the new, never a part.

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
    # The suffix stays, since writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if (
            error.errno is not None and error.filename is None
        ):  # a full disk does not say what it had no room for
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all; NaN and infinities are refused."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all; None becomes an empty cell."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)


def safe_name(text: str) -> str:
    """Return a file name for any text: valid on every file system, and never a path elsewhere."""
    return re.sub(r'[\\/:*?"<>|]', "_", text).strip(" .") or "_"


def source_hash(*files: str) -> str:
    """Return a hash over source files, so that a change of code makes cached values anew.

    Args:
        files: Modules' ``__file__``.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
