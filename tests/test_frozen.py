from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from anomaly_clip.backbones import weight_files
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.frozen import FrozenBackbone, fingerprint
from anomaly_clip.backbones.weight_files import in_one_sentence


class Plain(FrozenBackbone):
    """A backbone whose tower is one convolution; a linear layer is not part of the tower."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__(mean, std)
        self.convolution = nn.Conv2d(3, 2, 1)
        self.text = nn.Linear(2, 2)

    @property
    def label(self) -> tuple[str, str]:
        return "plain", "file.pt"

    @property
    def is_random(self) -> bool:
        return False

    @property
    def network(self) -> nn.Module:
        return self.convolution

    @property
    def tower(self) -> nn.Module:
        return self.convolution


def plain() -> Plain:
    return Plain([0.5, 0.0, 0.25], [0.5, 1.0, 0.25])


def test_uint8_is_normalised_and_floating_images_are_not() -> None:
    images = torch.tensor([0, 255, 102], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([-1.0, 1.0, 0.6]).view(1, 3, 1, 1)
    assert_close(plain().normalise(images), expected)
    assert_close(plain().normalise(expected), expected)


def test_casting_reaches_the_tower_alone_and_keeps_the_identity() -> None:
    backbone = plain()
    before = fingerprint(backbone.network)
    backbone.cast(torch.bfloat16)
    assert backbone.tower.weight.dtype == torch.bfloat16
    assert backbone.text.weight.dtype == torch.float32
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert backbone.normalise(images).dtype == torch.bfloat16
    assert backbone.identity == before != fingerprint(backbone.network)


def test_the_backbone_stays_in_evaluation_mode() -> None:
    assert not nn.ModuleList([plain()]).train()[0].training


def test_the_record_of_the_weights() -> None:
    weights = plain().weights
    assert (weights["backbone"], weights["pretrained"]) == ("plain", "file.pt")
    assert not weights["random"]
    assert weights["sha256"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_fingerprint_is_the_same_with_earlier_versions_of_pytorch(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They print a LayerNorm without its bias."""
    module = nn.Sequential(nn.LayerNorm((4,), bias=bias))
    monkeypatch.setattr(nn.LayerNorm, "extra_repr", lambda self: f"(4,), bias={bias}")
    expected = fingerprint(module)
    monkeypatch.setattr(nn.LayerNorm, "extra_repr", lambda self: "(4,)")
    assert fingerprint(module) == expected


def test_the_fingerprint_covers_values_names_types_and_activations() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    same = copy.deepcopy(module)
    assert fingerprint(same) == fingerprint(module)
    with torch.no_grad():
        same[0].bias[1] += 1e-7  # type: ignore[index,operator]
    others = [
        same,
        nn.Sequential(module[0], nn.GELU()),
        nn.Sequential(module[0], nn.Identity(), nn.ReLU()),
        copy.deepcopy(module).double(),
    ]
    assert len({fingerprint(other) for other in (module, *others)}) == 5


def test_a_mean_has_one_value_per_colour() -> None:
    with pytest.raises(ValueError, match=r"3 values, one per colour, got \[0\.5\]"):
        Plain([0.5], [1.0, 1.0, 1.0])
    settings: Any = {"name": "resnet18", "weights": "random", "mean": None}
    with pytest.raises(ValueError, match="3 values, one per colour, got None"):
        CNNBackbone(**settings, layers=["layer1"])


def test_no_autocast_inside() -> None:
    values: Tensor = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), plain().out_of_autocast():
        assert (values @ values).dtype == torch.float32


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 124.0])
def test_pixel_statistics_are_those_of_pixels_from_0_to_1(name: str, value: float) -> None:
    values = {"mean": [0.5] * 3, "std": [0.5] * 3, name: [0.5, value, 0.5]}
    with pytest.raises(ValueError, match=rf"backbone.{name}, of pixels in \[0, 1\], must be in"):
        Plain(**values)


def test_a_standard_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone.std.* must be in \(0, 10.0\], got 0.0"):
        Plain([0.5] * 3, [0.5, 0.5, 0.0])


def test_exhausted_memory_is_not_blamed_on_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def explained(error: BaseException) -> str:
        return "memory is not sufficient"

    monkeypatch.setattr(weight_files, "explain_exhaustion", explained)
    with pytest.raises(RuntimeError, match="can't allocate"), in_one_sentence("weights"):
        raise RuntimeError("can't allocate memory")
