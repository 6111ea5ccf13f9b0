"""How much memory there is."""

from __future__ import annotations

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
            return int(line.split()[1]) * 1024
    return None
