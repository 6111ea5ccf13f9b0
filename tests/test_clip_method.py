from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods import CLIPADA, SDP, WinCLIP
from anomaly_clip.methods.clip_method import CLIPMethod
from anomaly_clip.records import Scores


class Plain(CLIPMethod):
    def __init__(self, backbone: CLIPBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        return Scores(image_score=torch.zeros(len(images)))


def test_image_size_and_weights_are_those_of_the_clip(tiny_clip: CLIPBackbone) -> None:
    method = Plain(tiny_clip)
    assert method.image_size == tiny_clip.image_size
    assert method.weights == tiny_clip.weights


@pytest.mark.parametrize("kind", [CLIPADA, SDP, WinCLIP])
def test_methods_with_a_clip_share_the_base_class(kind: type[nn.Module]) -> None:
    assert issubclass(kind, CLIPMethod)
