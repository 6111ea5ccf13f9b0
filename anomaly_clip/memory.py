"""How much memory there is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["available_memory"]


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where that cannot be known."""
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
    """Return the bytes that a container's limit (cgroup v2) leaves; very many without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text() for name in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such files, or the word max
        return sys.maxsize
