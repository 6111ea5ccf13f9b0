"""Learning rate schedules: factors computed by hand, and endless training."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from anomaly_clip.schedules import half_cosine, total_epochs, total_steps, warmup_cosine


class Module(LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.trainer = Trainer(logger=False, enable_checkpointing=False, **options)


def test_half_a_cosine_by_hand() -> None:
    assert half_cosine(0.0, 0.2) == 1.0
    assert half_cosine(math.pi / 2, 0.2) == pytest.approx(0.6)  # halfway between 1 and 0.2
    assert half_cosine(math.pi, 0.2) == 0.2


def test_warmup_and_cosine_by_hand() -> None:
    factors = [warmup_cosine(step, warmup=4, total=12, last=0.1) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.55)  # halfway down the cosine
    assert factors[6] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert factors[12:] == [0.1, 0.1]  # constant beyond the end
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_no_warmup_begins_at_the_full_rate() -> None:
    assert warmup_cosine(0, warmup=0, total=10) == 1.0
    assert warmup_cosine(10, warmup=0, total=10) == 0.0


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (5, 5), (7, 3)])
def test_a_training_shorter_than_its_warmup(warmup: int, total: int) -> None:
    assert 0 <= warmup_cosine(warmup, warmup, total) <= 1


def test_without_warmup_the_factors_are_torchs() -> None:
    import torch
    from torch.optim.lr_scheduler import CosineAnnealingLR

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineAnnealingLR(optimizer, 9, eta_min=0.02)
    for step in range(10):
        assert schedule.get_last_lr()[0] == pytest.approx(warmup_cosine(step, 0, 9, 0.02))
        optimizer.step()
        schedule.step()


def test_the_length_of_a_training() -> None:
    assert total_epochs(Module(max_epochs=3)) == 3
    steps = Module(max_epochs=-1, max_steps=7)
    assert total_steps(steps) == 7
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        total_epochs(steps)


def test_an_endless_training_is_refused_with_the_way_out() -> None:
    module = Module(max_epochs=-1)
    with pytest.raises(
        ValueError,
        match=r"^Module decays its learning rate until the end of the training, but "
        r"trainer\.max_epochs -1 sets no end: set trainer\.max_epochs to 1 or more, or set "
        r"trainer\.max_steps$",
    ):
        total_steps(module, ", or set trainer.max_steps")
