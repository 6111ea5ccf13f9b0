from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from anomaly_clip.methods.tab_optim import TABOptim


def rates(optim: TABOptim, steps: int, epochs: int) -> list[float]:
    """Return the learning rate of each epoch of the trainer."""
    optimizer = optim.optimizer([nn.Parameter(torch.zeros(1))])
    schedule = optim.schedule(optimizer, steps, epochs)
    values = []
    for _ in range(epochs):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_the_rate_holds_for_all_passes_of_an_epoch() -> None:
    values = rates(TABOptim(lr=0.5, passes=2), steps=60, epochs=6)  # 3 epochs of two passes
    expected = [0.25 * (1 + math.cos(math.pi * epoch / 3)) for epoch in (0, 0, 1, 1, 2, 2)]
    assert values == pytest.approx(expected)


def test_the_official_cosine_has_as_many_epochs_as_an_epoch_has_steps() -> None:
    optim = TABOptim(lr=1.0, passes=1, scheduler_t_max="official")
    values = rates(optim, steps=40, epochs=4)  # ten steps per epoch
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * e / 10)) for e in range(4)])


@pytest.mark.parametrize(
    ("name", "kind", "setting"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adamw", torch.optim.AdamW, {"betas": (0.5, 0.999)}),
    ],
)
def test_optimisers(name: Any, kind: type, setting: dict[str, Any]) -> None:
    optimizer = TABOptim(name, lr=0.1).optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, kind)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.1
    assert {key: group[key] for key in setting} == setting


def test_bounds() -> None:
    with pytest.raises(ValueError, match=r"model\.optim\.lr must be above 0, got 0"):
        TABOptim(lr=0)
    with pytest.raises(ValueError, match=r"model\.optim\.passes must be 1 or more, got 0"):
        TABOptim(passes=0)
