"""SubspaceAD, AnomalyDINO and their ViT against arrays of the official codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Golden
from subspace_golden import Dino, close, fitted, normalised, square, vit_builder
from torch import Tensor

from anomaly_clip.backbones.clip import unit
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.maps import gaussian_blur, resize_maps
from anomaly_clip.methods import BatchedSubspaceAD, SubspaceAD
from anomaly_clip.methods.nearest_patches import batched_distances, cosine_distances
from anomaly_clip.methods.object_masks import grid_object_mask
from anomaly_clip.methods.rotations import regular_rotations
from anomaly_clip.methods.subspace import smoothed_maps, top_mean
from anomaly_clip.metrics import Evaluator, EvaluatorSettings

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def arrays(golden: Callable[[str], Golden]) -> Golden:
    return golden("subspace")


@pytest.fixture(scope="module")
def build(arrays: Golden) -> Callable[[int, int], ViTBackbone]:
    return vit_builder(arrays)


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
    close(smoothed_maps(squares, (expected.shape[0], expected.shape[1]))[0], expected, 1e-3)


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
    side, size = round(distances.shape[1] ** 0.5), meta["image_size"]
    maps = smoothed_maps(distances.float().view(-1, side, side), (size, size))
    scores = top_mean(maps.flatten(1))
    if setting == "batch":
        options = {"image_size": size, "layers": sorted(meta["layers"])}
        method = BatchedSubspaceAD(subspace_ad.backbone, explained=meta["ev"], **options)
        output = method.score(queries, [arrays.meta["category"]] * len(queries))
        scores, maps = output["image_score"], output["anomaly_map"]
    close(maps[: len(expected["map"])], expected["map"], 1e-3)
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


def test_distances_from_all_other_images(dino: Dino) -> None:
    expected, quantile = dino.arrays.named("dino_batch."), dino.meta["quantile"]
    units = unit(dino.tokens)
    distances = torch.stack([batched_distances(units, n, quantile) for n in range(len(units))])
    official = expected["distance"].flatten(1)
    close(distances[official.isfinite()], official[official.isfinite()], 1e-4)
    if expected["score"].isfinite().all():
        close(top_mean(distances), expected["score"], 1e-4)
