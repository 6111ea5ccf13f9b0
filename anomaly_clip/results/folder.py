"""The folders of runs."""

from __future__ import annotations

from pathlib import Path

__all__ = ["create_run_folder"]


def create_run_folder(root: Path, name: str) -> Path:
    """Create ``root/name/<n>`` with the next free number; two runs never share a folder.

    Raises:
        ValueError: If the folder cannot be made.
    """
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (parent / str(number)).mkdir()
            except FileExistsError:
                continue  # another run was faster
            return parent / str(number)
    except OSError as error:
        raise ValueError(f"output.root {root}: cannot make a run folder there ({error})") from None
