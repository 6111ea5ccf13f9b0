"""Writing files that are never half there, and the folder for what can be made again."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "atomic_path", "cache_folder"]

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
