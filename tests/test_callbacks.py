"""Callbacks of a fit, with a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anomaly_clip import callbacks
from anomaly_clip.callbacks import DataWaitMonitor


def test_the_share_of_waiting_is_summed_over_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start and end of each batch; the first of an epoch, before which processes start, is free."""
    epochs = [[(5, 6), (8, 9), (12, 18), (19, 20)], [(100, 101), (102, 105)]]
    ticks = iter([float(tick) for epoch in epochs for batch in epoch for tick in batch])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    logged: list[float] = []
    module: Any = SimpleNamespace(log=lambda name, value, sync_dist: logged.append(value))
    trainer: Any = None
    monitor = DataWaitMonitor()
    for epoch in epochs:
        monitor.on_train_epoch_start(trainer, module)
        assert monitor.share == 0
        for _ in epoch:
            monitor.on_train_batch_start()
            monitor.on_train_batch_end()
        monitor.on_train_epoch_end(trainer, module)
    waited, worked = (8 - 6) + (12 - 9) + (19 - 18), 1 + 6 + 1
    assert logged == pytest.approx([waited / (waited + worked), 1 / (1 + 3)])
