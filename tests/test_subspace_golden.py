"""SubspaceAD, AnomalyDINO and their ViT against arrays of the official codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
from helpers import Golden
from PIL import Image
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.methods.anomaly_dino import cosine_distances, grid_object_mask
from anomaly_clip.methods.gaussians import RunningMoments
from anomaly_clip.methods.rotations import regular_rotations
from anomaly_clip.methods.subspace_ad import (
    BLUR_SIGMA,
    BLUR_TRUNCATE,
    Subspace,
    SubspaceAD,
    patch_maps,
    principal_subspace,
    top_mean,
)
from anomaly_clip.metrics import Evaluator, EvaluatorSettings

pytestmark = pytest.mark.golden
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def arrays(golden: Callable[[str], Golden]) -> Golden:
    return golden("subspace")


@pytest.fixture(scope="module")
def build(arrays: Golden) -> Callable[[int, int], ViTBackbone]:
    """Return a function that builds the official ViT for images of a height and width."""
    config = json.loads((arrays.folder / "model_config.json").read_text())
    swiglu = config.pop("swiglu")
    if swiglu:
        config["mlp_layer"] = SwiGLUPacked
        config["act_layer"] = torch.nn.SiLU

    def golden_vit(pretrained: bool = False, **options: object) -> VisionTransformer:
        for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(name, None)
        return VisionTransformer(**{**config, **options})

    golden_vit.__module__ = __name__
    timm.models.register_model(golden_vit)

    def make(height: int, width: int) -> ViTBackbone:
        weights = str(arrays.folder / "state_dict.safetensors")
        return ViTBackbone("golden_vit", weights, (height, width), MEAN.tolist(), STD.tolist())

    return make


def square(images: Tensor, side: int) -> Tensor:
    """Resize uint8 images ``(n, H, W, 3)`` to uint8 ``(n, 3, side, side)``, as the house does."""
    resized = [
        Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC)
        for image in images
    ]
    return (
        torch.stack([torch.tensor(list(i.tobytes()), dtype=torch.uint8) for i in resized])
        .view(len(images), side, side, 3)
        .permute(0, 3, 1, 2)
    )


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).float()


def fitted(features: Tensor, explained: float) -> Subspace:
    """Return the subspace of features ``(M, C)``."""
    moments = RunningMoments()
    moments.add(features.unsqueeze(1))
    return principal_subspace(moments.take(), explained)


# -- SubspaceAD ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subspace_ad(arrays: Golden, build: Callable[[int, int], ViTBackbone]) -> SubspaceAD:
    side, layers = arrays.meta["subspace"]["image_size"], arrays.meta["subspace"]["layers"]
    return SubspaceAD(build(side, side), image_size=side, layers=sorted(layers))


@pytest.fixture(scope="module")
def queries(arrays: Golden) -> Tensor:
    return square(arrays.inputs["e2e.images"], arrays.meta["subspace"]["image_size"])


def test_preprocessing_is_that_of_the_official_code(arrays: Golden, queries: Tensor) -> None:
    expected = arrays.expected["subspace.preprocessed"]
    close(normalised(queries[: len(expected)]), expected, 1e-5)


def test_tokens_are_the_hidden_states(
    arrays: Golden, subspace_ad: SubspaceAD, queries: Tensor
) -> None:
    expected = {int(name): tokens for name, tokens in arrays.named("encode.block.").items()}
    count = len(next(iter(expected.values())))
    outputs = subspace_ad.backbone(queries[:count], sorted(expected))
    for (_, tokens), output in zip(sorted(expected.items()), outputs, strict=True):
        close(output.raw, tokens, 1e-3)


@pytest.mark.parametrize("name", ["features", "features_concat"])
def test_features_are_those_of_all_layers(
    name: str, arrays: Golden, subspace_ad: SubspaceAD, queries: Tensor
) -> None:
    expected = arrays.expected[f"subspace.{name}"]
    layers = arrays.meta["subspace"]["layers"]
    images = queries[: len(expected)]
    if name == "features":
        features = subspace_ad.embed(images)
    else:
        maps = dict(
            zip(
                sorted(layers),
                subspace_ad.backbone.feature_maps(images, sorted(layers)),
                strict=True,
            )
        )
        features = torch.cat([maps[layer] for layer in layers], dim=1).flatten(2).mT
    close(features, expected.flatten(1, 2), 1e-3)


def test_the_subspace_and_all_distances(arrays: Golden) -> None:
    meta, inputs, expected = arrays.meta["subspace"], arrays.inputs, arrays.expected
    for explained in meta["evs"]:
        subspace = fitted(inputs["pca.features"], explained)
        place = f"pca.{explained}."
        assert subspace.components.shape[1] == int(expected[f"{place}k"])
        close(subspace.mean, expected[f"{place}mean"], 1e-8)
        close(subspace.eigenvalues, expected[f"{place}eigenvalues"], 1e-8)
        close(subspace.components @ subspace.components.T, expected[f"{place}projector"], 1e-8)
        for distance in meta["methods"]:
            official = expected[f"{place}{distance}"]
            atol = 1e-5 * max(1.0, float(official.abs().max()))
            close(subspace.distances(inputs["pca.probe"], distance), official, atol)


def test_maps_are_smoothed_like_the_official_ones(arrays: Golden) -> None:
    expected = arrays.expected["subspace.post_processed"]
    squares = torch.arange(12.0).square().view(1, 3, 4)
    maps = resize_maps(squares, (expected.shape[0], expected.shape[1]))
    close(
        gaussian_blur(maps, BLUR_SIGMA, truncate=BLUR_TRUNCATE, border="inner")[0], expected, 1e-3
    )


@pytest.mark.parametrize("setting", ["few", "batch"])
def test_a_complete_test(
    setting: str, arrays: Golden, subspace_ad: SubspaceAD, queries: Tensor
) -> None:
    meta, expected = arrays.meta["subspace"], arrays.named(f"subspace_{setting}.")
    normal = square(arrays.inputs["e2e.train_images"][meta["shots"]], meta["image_size"])
    images = normal if setting == "few" else queries
    patches = torch.cat([subspace_ad.embed(image[None])[0] for image in images])
    subspace = fitted(patches, meta["ev"])
    assert subspace.components.shape[1] == int(expected["k"])
    close(subspace.eigenvalues, expected["eigenvalues"], 1e-3)
    distances = subspace.distances(subspace_ad.embed(queries))
    close(distances, expected["patch_map"], 1e-3)
    maps = patch_maps(distances.float(), (meta["image_size"], meta["image_size"]))
    close(maps[: len(expected["map"])], expected["map"], 1e-3)
    scores = top_mean(maps.flatten(1))
    close(scores, expected["score"], 1e-3)
    evaluator = Evaluator([arrays.meta["category"]], EvaluatorSettings(pro_steps=None))
    masks = arrays.expected["subspace.gt_px"].bool()
    evaluator.update(
        {"image_score": scores, "anomaly_map": maps},
        {
            "image": queries,
            "mask": masks,
            "label": arrays.inputs["e2e.labels"].bool(),
            "category": [arrays.meta["category"]] * len(masks),
            "index": torch.arange(len(masks)),
            "path": [str(row) for row in range(len(masks))],
        },
    )
    mean = evaluator.compute()["mean"]
    image_auroc, pixel_auroc, pro = expected["metrics"].tolist()
    assert mean["image_auroc"] == pytest.approx(image_auroc, abs=1e-3)
    assert mean["pixel_auroc"] == pytest.approx(pixel_auroc, abs=1e-3)
    assert mean["pixel_pro"] == pytest.approx(pro, abs=5e-3)


# -- AnomalyDINO ---------------------------------------------------------------------------------


def resized(images: Tensor, edge: int, patch: int) -> Tensor:
    """Resize images ``(n, H, W, 3)`` so that their smaller edge is ``edge``; crop to patches."""
    height, width = images.shape[1:3]
    small = min(height, width)
    size = (int(edge * width / small), int(edge * height / small))
    rows, columns = size[1] // patch * patch, size[0] // patch * patch
    resized = [
        torch.frombuffer(
            bytearray(Image.fromarray(i.numpy()).resize(size, Image.Resampling.BICUBIC).tobytes()),
            dtype=torch.uint8,
        ).view(size[1], size[0], 3)
        for i in images
    ]
    return torch.stack(resized)[:, :rows, :columns].permute(0, 3, 1, 2)


class Dino:
    """The official settings on the golden images."""

    def __init__(self, arrays: Golden, build: Callable[[int, int], ViTBackbone]) -> None:
        self.arrays = arrays
        meta = self.meta = arrays.meta["dino"]
        config = json.loads((arrays.folder / "model_config.json").read_text())
        self.patch = config["patch_size"]
        self.grid = tuple(meta["grid"])
        self.backbone = build(*(n * self.patch for n in self.grid))
        self.images = self.resized(arrays.inputs["e2e.images"])
        self.tokens = torch.stack([self.embed(image[None])[0] for image in self.images])

    def resized(self, images: Tensor) -> Tensor:
        return resized(images, self.meta["edge"], self.patch)

    def embed(self, images: Tensor) -> Tensor:
        """Return the patches ``(B, N, C)`` after the final norm."""
        last = [self.backbone.num_layers]
        (maps,) = self.backbone.feature_maps(images, last, norm=True)
        return maps.flatten(2).mT

    def bank(self, rotated: bool) -> Tensor:
        normal = self.arrays.inputs["e2e.train_images"][self.meta["shots"]]
        if rotated:
            copies = [regular_rotations(image.permute(2, 0, 1)) for image in normal]
            normal = torch.cat(copies).permute(0, 2, 3, 1)
        return unit(torch.cat([self.embed(image[None])[0] for image in self.resized(normal)]))


@pytest.fixture(scope="module")
def dino(arrays: Golden, build: Callable[[int, int], ViTBackbone]) -> Dino:
    return Dino(arrays, build)


def test_preprocessing_and_tokens_of_anomaly_dino(dino: Dino) -> None:
    expected = dino.arrays.expected
    close(normalised(dino.images[0])[:, ::7, ::7], expected["dino.preprocessed"], 1e-5)
    close(dino.tokens[0], expected["dino.tokens"], 1e-3)


def test_rotated_copies(dino: Dino) -> None:
    image = dino.arrays.inputs["e2e.train_images"][0].permute(2, 0, 1)
    copies = regular_rotations(image).permute(0, 2, 3, 1)
    close(copies, dino.arrays.expected["dino.rotated"], 1)


def test_the_object_mask(dino: Dino) -> None:
    expected = dino.arrays.expected["dino.mask"].bool()
    mask = grid_object_mask(dino.tokens[0], dino.grid, dino.meta["mask_threshold"], "column")
    assert (mask != expected).double().mean() <= 0.01


@pytest.mark.parametrize("setting", ["dino", "dino_rotated", "dino_masked"])
def test_distances_and_scores(setting: str, dino: Dino) -> None:
    expected = dino.arrays.named(f"{setting}.")
    distances = cosine_distances(unit(dino.tokens), dino.bank(setting == "dino_rotated"))
    official = expected["distance"].flatten(1)
    compared = torch.ones_like(official, dtype=torch.bool)
    if setting == "dino_masked":
        threshold = dino.meta["mask_threshold"]
        masks = [grid_object_mask(t, dino.grid, threshold, "column") for t in dino.tokens]
        distances = distances * torch.stack(masks)
        compared = (distances == 0) == (official == 0)
        assert (~compared).double().mean() <= 0.01
    close(distances[compared], official[compared], 1e-4)
    whole = compared.all(dim=1)
    close(top_mean(distances)[whole], expected["score"][whole], 1e-4)
    assert whole.any()


def test_maps_of_anomaly_dino_have_the_size_of_the_image(dino: Dino) -> None:
    expected = dino.arrays.expected["dino.map"]
    distances = cosine_distances(unit(dino.tokens[: len(expected)]), dino.bank(False))
    maps = resize_maps(
        distances.view(len(expected), *dino.grid), (expected.shape[1], expected.shape[2])
    )
    close(gaussian_blur(maps, 4.0), expected, 1e-4)
