"""Free memory of a device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["GB", "available_memory", "check_room"]

ROOM = 0.8
"""Share of the free memory that a fit may use."""
GB = 1e9


def check_room(cost: Mapping[torch.device, int], name: str, purpose: str, way_out: str) -> None:
    """Refuse a fit that needs more than ``ROOM`` of the free memory of a device.

    Args:
        cost: Bytes that the fit takes on each device.
        name: The method.
        purpose: Content of the memory, for the message.
        way_out: Advice for the message.

    Raises:
        ValueError: If the fit needs more.
    """
    for device, needed in cost.items():
        free = available_memory(device)
        if free is not None and needed > ROOM * free:
            raise ValueError(
                f"{name} needs about {needed / GB:.3g} GB for {purpose}, but may only use "
                f"{ROOM:.0%} of the {free / GB:.3g} GB that are free on {device}: {way_out}"
            )


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
