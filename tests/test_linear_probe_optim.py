from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.methods import LinearProbe
from anomaly_clip.methods.linear_probe import ProbeOptim

RANDOM_NETWORK = CNNSettings("resnet18", "random")


def test_the_rate_follows_a_cosine_from_the_default_of_the_mode() -> None:
    class Finite:
        estimated_stepping_batches = 10

    for frozen, lr, decay in ((True, 0.1, 0.0), (False, 0.01, 1e-4)):
        probe = LinearProbe(RANDOM_NETWORK, image_size=32, frozen=frozen)
        probe._set_classes("single", ["a", "b"], "the test")
        probe._trainer = Finite()  # type: ignore[assignment]
        configured = probe.configure_optimizers()
        optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        [group] = optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (lr, 0.9, decay)
        assert len(group["params"]) == (2 if frozen else 62)
        rates = []
        for _ in range(11):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        cosine = [lr * (0.5 + 0.5 * np.cos(np.pi * step / 10)) for step in range(11)]
        np.testing.assert_allclose(rates, cosine, atol=1e-9)
    assert ProbeOptim(lr=3.0).of(True) == ProbeOptim(3.0, 0.9, 0.0)


@pytest.mark.parametrize(("frozen", "lr", "decay"), [(True, 0.1, 0.0), (False, 0.01, 1e-4)])
def test_null_settings_depend_on_whether_the_backbone_is_frozen(
    frozen: bool, lr: float, decay: float
) -> None:
    assert ProbeOptim().of(frozen) == ProbeOptim(lr, 0.9, decay)
    given = ProbeOptim(lr=0.5, weight_decay=0.0, momentum=0.0, schedule="none")
    assert given.of(frozen) == given  # 0 is a value, not null


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"model\.optim\.lr must be above 0, got 0"),
        ({"momentum": 1.0}, r"model\.optim\.momentum must be in \[0, 1\), got 1"),
        ({"momentum": -0.1}, r"model\.optim\.momentum must be in \[0, 1\)"),
        ({"weight_decay": -1e-9}, r"model\.optim\.weight_decay must be 0 or more"),
    ],
)
def test_bounds(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeOptim(**options)  # type: ignore[arg-type]


class Line(LightningModule):
    """A module with a frozen and a trained weight."""

    def __init__(self, steps: float) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(()))
        trainer = SimpleNamespace(estimated_stepping_batches=steps, max_epochs=-1)
        self._trainer = trainer  # type: ignore[assignment]


def test_only_trainable_parameters_are_updated() -> None:
    settings = ProbeOptim(lr=0.5, momentum=0.0, weight_decay=0.0, schedule="none")
    module = Line(10)
    optimizer = settings.build(module)
    assert [group["params"] for group in optimizer.param_groups] == [[module.weight]]
    for _ in range(2):
        module.weight.grad = torch.tensor(0.25)
        optimizer.step()
    assert module.weight.item() == 1 - 2 * 0.5 * 0.25  # with a constant learning rate
    assert module.frozen.item() == 1


def test_a_cosine_needs_an_end() -> None:
    settings = ProbeOptim().of(True)
    configured: Any = settings.build(Line(4))
    assert configured["lr_scheduler"]["interval"] == "step"
    assert configured["lr_scheduler"]["scheduler"].T_max == 4
    with pytest.raises(ValueError, match=r"or set model\.optim\.schedule to none"):
        settings.build(Line(float("inf")))
