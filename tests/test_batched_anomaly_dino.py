from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import quiet_trainer
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.maps import patches_to_map
from anomaly_clip.methods import BatchedAnomalyDINO
from anomaly_clip.methods.object_masks import object_masks

SIZE = 64


@pytest.fixture(scope="module")
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone("test_vit", "random", SIZE)


def images_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("quantile", "count"), [(0.001, 1), (0.1, 3)])
def test_scores_are_those_of_scikit_learn(
    quantile: float, count: int, backbone: ViTBackbone
) -> None:
    """Of 48 patches of other images, the nearest ``max(1, int(quantile 48) - 1)`` are averaged."""
    images = images_of(4)
    method = BatchedAnomalyDINO(backbone, SIZE, quantile=quantile, sigma=2.0)
    scores = method.score(images, ["a"] * 4)
    patches = method.embed(images)
    for row in range(4):
        others = torch.cat([patches[:row], patches[row + 1 :]]).flatten(0, 1)
        search = NearestNeighbors(metric="cosine", algorithm="brute").fit(others.numpy())
        nearest, _ = search.kneighbors(patches[row].numpy(), count)
        distances = torch.from_numpy(nearest.mean(axis=1))[None]
        assert_close(scores["image_score"][row], distances.max(), atol=1e-5, rtol=0)
        expected = gaussian_filter(patches_to_map(distances, (SIZE, SIZE))[0].numpy(), 2.0)
        assert_close(scores["anomaly_map"][row].numpy(), expected, atol=1e-5, rtol=0)


def test_masked_patches_have_distance_zero(backbone: ViTBackbone) -> None:
    images = images_of(3)
    options: dict[str, Any] = {"sigma": 0.0, "mask_threshold": 3.0}
    plain = BatchedAnomalyDINO(backbone, SIZE, **options)
    method = BatchedAnomalyDINO(backbone, SIZE, masks="on", **options)
    patches = method.embed(images)
    masks = object_masks(patches, 3.0, "column")
    assert 0 < masks.double().mean() < 1
    expected = plain.patch_distances("a", patches, range(3)) * masks
    assert_close(method.patch_distances("a", patches, range(3)), expected)
    assert_close(method.score(images, ["a"] * 3)["image_score"], expected.amax(dim=1))


def test_the_protocol_names_masks_where_there_are_some(backbone: ViTBackbone) -> None:
    for masks, expected in (("on", {"threshold": 2.0, "shape": "grid"}), ("auto", None)):
        options: dict[str, Any] = {"masks": masks, "mask_threshold": 2.0, "mask_shape": "grid"}
        method = BatchedAnomalyDINO(backbone, SIZE, **options)
        method.trainer = quiet_trainer()
        method.evaluator = method.new_evaluator(["pill", "screw"])
        assert method.protocol()["object_masks"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2, 4]}, "BatchedAnomalyDINO compares patches of one layer; give one"),
        ({"quantile": 0.0}, "model.quantile"),
        ({"quantile": 1.1}, "model.quantile"),
        ({"masks": "yes"}, "model.masks must be one of auto, on, off"),
        ({"sigma": -1.0}, "model.sigma must be 0 or more"),
    ],
)
def test_unsupported_options_are_refused(
    backbone: ViTBackbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedAnomalyDINO(backbone, SIZE, **options)
