"""Local places of weights: files, folders, and repositories in the model hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["local_file", "looks_like_file"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
IN_FOLDER = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin"),
)
"""Weights files in a folder of the model hub; the first that exists is used."""


def looks_like_file(value: str) -> bool:
    """Return whether a value is meant as a path or an address rather than a tag."""
    return value.endswith(SUFFIXES) or "/" in value or "\\" in value


def local_file(value: str, option: str, others: str = "") -> Path:
    """Return the weights file at a path; of a folder, the weights file in it.

    Args:
        value: Path of a file or folder, as the user typed it.
        option: Name of the option, for messages.
        others: Other values that the option takes, for messages, such as ``, or 'random'``.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the value is an address or no path that the system accepts, or the folder
            does not contain one weights file.
    """
    if re.match(r"[\w+.-]+://|hf-hub:|local-dir:", value):
        raise ValueError(
            f"{option} {value} is an address, not a file: download the weights file, and the JSON "
            f"files next to it, and give its path{others}"
        )
    try:
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # described below
    except (OSError, RuntimeError, ValueError) as error:  # a long name, an unknown home directory
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{option} {value} is a path that cannot be opened ({why}); give the path of an "
            f"existing weights file{others}"
        ) from None
    if path.is_dir():
        return _file_in(path, option)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{option} {value} is a link to {path.readlink()}, which does not exist; copy the "
            f"folder together with the files that its links lead to"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{option} {value}: there is no such file; give an existing weights file{others}"
        )
    return path


def _file_in(folder: Path, option: str) -> Path:
    """Return the weights file of a snapshot, of a repository in the hub's cache, or of a folder."""
    main = folder / "refs" / "main"
    if (folder / "snapshots").is_dir():
        snapshots = [p for p in (folder / "snapshots").iterdir() if p.is_dir()]
        if main.is_file():
            snapshots = [folder / "snapshots" / main.read_text(encoding="utf-8").strip()]
        if len(snapshots) == 1:
            folder = snapshots[0]
    files = sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES and p.is_file())
    names = [name for name in IN_FOLDER if folder / name in files]
    if not names and len(files) == 1:
        return files[0]
    if not names:
        some = ", ".join(file.name for file in files[:3])
        content = f"{len(files)} weights files ({some})" if files else "no weights file"
        raise ValueError(f"{option} {folder} is a folder with {content}: give the path of one file")
    return folder / names[0]
