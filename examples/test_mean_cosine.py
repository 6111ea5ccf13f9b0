from collections.abc import Callable

import pytest
import torch
from mean_cosine import MeanCosine

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.maps import patches_to_map
from anomaly_clip.testing import check_method

SMALL = {"backbone": {"name": "resnet18", "weights": "random"}, "image_size": 32}


def test_maps_are_cosine_distances_to_the_mean() -> None:
    method = MeanCosine(CNNSettings(weights="random"), image_size=32, sigma=0.0)
    images = torch.randn(3, 3, 32, 32)
    patches = method.embed(images)  # (3, 16, C)
    method.keep(mean=patches[0, 0])
    scores = method.score(images, ["bottle"] * 3)
    distances = 1 - torch.cosine_similarity(patches, patches[0, 0], dim=-1)
    torch.testing.assert_close(scores["anomaly_map"], patches_to_map(distances, (32, 32)))
    torch.testing.assert_close(scores["image_score"], scores["anomaly_map"].amax(dim=(1, 2)))


@pytest.mark.parametrize("check", check_method(MeanCosine, arguments=SMALL), ids=str)
def test_contract(check: Callable[[], None]) -> None:
    check()
