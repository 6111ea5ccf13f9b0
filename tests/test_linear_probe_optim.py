from __future__ import annotations

import numpy as np

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.methods import LinearProbe
from anomaly_clip.methods.linear_probe import ProbeOptim

RANDOM_NETWORK = CNNSettings("resnet18", "random")


def test_the_rate_falls_along_a_cosine_and_its_start_depends_on_the_mode() -> None:
    class Known:
        estimated_stepping_batches = 10

    for frozen, lr, decay in ((True, 0.1, 0.0), (False, 0.01, 1e-4)):
        probe = LinearProbe(RANDOM_NETWORK, image_size=32, frozen=frozen)
        probe._know("single", ["a", "b"], "the test")
        probe._trainer = Known()  # type: ignore[assignment]
        made = probe.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
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
