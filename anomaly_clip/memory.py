"""Free memory of a device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["available_memory"]


def available_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # not Linux
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _left_to_container())
    return None


def _left_to_container() -> int:
    """Return the bytes left below a container's cgroup v2 limit, ``sys.maxsize`` if not limited."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text() for name in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such files, or no limit ("max")
        return sys.maxsize
