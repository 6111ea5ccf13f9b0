"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anomaly_clip import memory


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("7000000", 3_000_000), ("9000000000", 5_000_000 * 1024), ("max", 5_000_000 * 1024)],
)
def test_available_memory_respects_the_limit_of_the_container(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller of the machine's available memory and the limit minus the memory in use."""
    files = {
        "proc/meminfo": "MemTotal: 9000000 kB\nMemFree: 1 kB\nMemAvailable: 5000000 kB\n",
        "sys/fs/cgroup/memory.max": f"{limit}\n",
        "sys/fs/cgroup/memory.current": "4000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    cpu = torch.device("cpu")
    assert memory.available_memory(cpu) == expected
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()  # no container
    assert memory.available_memory(cpu) == 5_000_000 * 1024
    (tmp_path / "proc/meminfo").unlink()  # not Linux
    assert memory.available_memory(cpu) is None
