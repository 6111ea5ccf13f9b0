"""MuSc in memory and against the official arrays; its commands are in test_musc_commands.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones import blocks, clip_towers, vit
from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.maps import image_score, patches_to_map
from anomaly_clip.methods import MuSc, musc, musc_encoder
from anomaly_clip.methods.musc_encoder import class_vectors, encode, encoder_of, halves
from anomaly_clip.methods.musc_images import resize_grids
from anomaly_clip.methods.mutual_scoring import aggregate, mutual_scores, rescore
from anomaly_clip.metrics import Evaluator, EvaluatorSettings
from anomaly_clip.records import Encoder, Scores

VOCABULARY = 49408
MEASURED = (
    *("image_auroc", "image_f1_max", "image_ap"),
    *("pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_pro"),
)
"""Order of the official metrics."""


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


# -- official arrays -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arrays(golden: Callable[[str], Golden]) -> Golden:
    return golden("musc")


@pytest.fixture(scope="module")
def official(arrays: Golden, tmp_path_factory: pytest.TempPathFactory) -> MuSc:
    """Return MuSc with the official weights; its text tower, which is a stub, becomes a whole."""
    folder = tmp_path_factory.mktemp("musc")
    config = json.loads((arrays.folder / "model_config.json").read_text())
    config["text_cfg"]["vocab_size"] = VOCABULARY
    (folder / "model.json").write_text(json.dumps(config))
    state = load_file(arrays.folder / "state_dict.safetensors")
    width = state["token_embedding.weight"].shape[1]
    state["token_embedding.weight"] = torch.zeros(VOCABULARY, width)
    save_file(state, folder / "state_dict.safetensors")
    meta = arrays.meta
    settings = CLIPSettings(
        str(folder / "model.json"),
        str(folder / "state_dict.safetensors"),
        meta["image_size"],
        positions="bicubic",
    )
    options = {name: meta[name] for name in ("layers", "r_list", "interval")}
    return MuSc(settings, k_list=meta["e2e_k_list"], **options).eval()


def order_of(arrays: Golden, name: str) -> list[int]:
    """Return the images of arrays, in their order."""
    return [index for part in arrays.meta["parts"][name] for index in part]


def resized(images: Tensor, size: int) -> Tensor:
    """Return uint8 images ``(n, 3, S, S)``, resized as MuSc does."""
    arrays = [
        np.array(Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC))
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def images(arrays: Golden) -> Tensor:
    return resized(arrays.inputs["e2e.images"], arrays.meta["image_size"])


@pytest.mark.golden
def test_golden_encoder(arrays: Golden, official: MuSc, images: Tensor) -> None:
    expected, backbone = arrays.expected, official.backbone
    assert isinstance(backbone, CLIPBackbone)
    positions = backbone.visual.positional_embedding
    close(positions, expected["encode.positional_embedding"], 1e-5)
    preprocessed = expected["e2e.preprocessed"]
    first = images[order_of(arrays, "e2e")[: len(preprocessed)]]
    close(backbone.normalise(first), preprocessed, 1e-5)
    layers = arrays.meta["layers"]
    numbers = sorted({*layers, backbone.num_layers})
    tokens = dict(zip(numbers, backbone(first, numbers), strict=True))
    assert len(arrays.named("encode.tokens.")) == len(layers)
    for layer in layers:
        close(tokens[layer].raw, expected[f"encode.tokens.{layer}"], 1e-3)
    close(tokens[backbone.num_layers].projected[:, 0], expected["encode.class_token"], 1e-4)


@pytest.mark.golden
def test_golden_mutual_scores_of_images(arrays: Golden, official: MuSc, images: Tensor) -> None:
    encoded = official.encoder.encode(images[order_of(arrays, "e2e")])
    vectors = class_vectors(encoded)
    close(vectors, arrays.expected["e2e.class_tokens"], 1e-5)
    named = arrays.named("e2e.msm.r")
    assert len(named) == len(arrays.meta["layers"]) * len(arrays.meta["r_list"])
    for name, expected in named.items():
        r, _, layer = name.partition(".")
        features = aggregate(encoded[layer], int(r))
        close(mutual_scores(features, arrays.meta["interval"]), expected, 1e-4)


def unrounded(encoder: Encoder, images: Tensor, source: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in encoder.encode(images).items()}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["e2e", "e2e_divided"])
def test_golden_scores(
    arrays: Golden,
    official: MuSc,
    images: Tensor,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half precision, in which features are kept, has a test of its own."""
    monkeypatch.setattr(musc, "halves", unrounded)
    expected = {key: arrays.expected[f"{name}.{key}"] for key in ("patch_map", "map", "score")}
    raw = arrays.expected[f"{name}.score_raw"]
    parts = arrays.meta["parts"][name]
    scored = [official.score(images[part], len(part) * [name]) for part in parts]
    maps = torch.cat([part["anomaly_map"] for part in scored])
    close(maps, expected["map"], 1e-4)
    close(image_score(maps), raw, 1e-4)
    size = (arrays.meta["image_size"],) * 2
    close(patches_to_map(expected["patch_map"], size, align_corners=True), maps, 1e-4)
    encoded = official.encoder.encode(images[order_of(arrays, name)])
    vectors = class_vectors(encoded)
    scores = rescore(image_score(maps), vectors, arrays.meta["e2e_k_list"])
    close(scores, expected["score"], 1e-3)
    if len(parts) == 1:
        close(scored[0]["image_score"], expected["score"], 1e-3)


@pytest.mark.golden
def test_golden_maps_of_features_in_half_precision(
    arrays: Golden, official: MuSc, images: Tensor
) -> None:
    [part] = arrays.meta["parts"]["e2e"]
    maps = official.score(images[part], len(part) * ["a"])["anomaly_map"]
    expected = arrays.expected["e2e.map"]
    close(maps, expected, 0.02 * float(expected.std()))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["e2e", "e2e_divided"])
@pytest.mark.parametrize("exact", [False, True])
def test_golden_metrics(arrays: Golden, name: str, exact: bool) -> None:
    size = arrays.meta["image_size"]
    masks = arrays.inputs["e2e.masks"].numpy()
    labels = arrays.inputs["e2e.labels"].bool()
    truth = torch.zeros(len(masks), size, size, dtype=torch.bool)
    for number, mask in enumerate(masks):  # only pixels that are still 255 count
        small = Image.fromarray(mask).resize((size, size), Image.Resampling.BILINEAR)
        truth[number] = torch.from_numpy(np.array(small)) == 255
    assert torch.equal(truth[order_of(arrays, "e2e")], arrays.expected["e2e.gt_px_official"].bool())
    order = order_of(arrays, name)
    evaluator = Evaluator(["a"], EvaluatorSettings(pro_steps=200, exact=exact))
    scores = Scores(
        image_score=arrays.expected[f"{name}.score"],
        anomaly_map=arrays.expected[f"{name}.map"],
    )
    batch: Any = {
        "path": [str(index) for index in order],
        "category": len(order) * ["a"],
        "label": labels[order],
        "mask": truth[order],
        "index": torch.tensor(order),
    }
    evaluator.update(scores, batch)
    mean = evaluator.compute()["mean"]
    for key, expected in zip(MEASURED, arrays.expected[f"{name}.metrics"].tolist(), strict=True):
        tolerance = 5e-3 if key == "pixel_pro" else 1e-3
        assert mean[key] == pytest.approx(expected, abs=tolerance), key


# -- in memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn() -> CNNBackbone:
    torch.manual_seed(0)
    return CNNBackbone("mobilenet_v3_small", "random", ["features.1", "features.3"])


def random_images(n: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def small(backbone: CLIPBackbone, **options: Any) -> MuSc:
    return MuSc(backbone, **{"layers": [2, 4], "r_list": [1, 3], **options}).eval()


def test_scores_are_the_averages_of_the_pure_functions(tiny_clip: CLIPBackbone) -> None:
    images, interval = random_images(7), [0, 0.5]
    method = small(tiny_clip, interval=interval, k_list=[1, 3])
    tokens = tiny_clip(images, [2, 4])
    maps = torch.stack(
        [
            mutual_scores(aggregate(layer.raw[:, 1:].mT.unflatten(2, (4, 4)), r), interval)
            for layer in tokens
            for r in (1, 3)
        ]
    ).mean(dim=0)
    scores = method.score(images, ["a"] * 7)
    close(scores["anomaly_map"], patches_to_map(maps, (32, 32), align_corners=True), 2e-3)
    raw = scores["anomaly_map"].amax(dim=(1, 2))
    vectors = unit(tokens[-1].projected[:, 0])
    close(scores["image_score"], rescore(raw, vectors, [1, 3]), 1e-4)


def test_categories_of_a_batch_are_apart(tiny_clip: CLIPBackbone) -> None:
    images, names = random_images(7), list("abaabba")
    method = small(tiny_clip)
    together = method.score(images, names)
    for name in "ab":
        rows = [row for row, category in enumerate(names) if category == name]
        apart = method.score(images[rows], [name] * len(rows))
        close(together["anomaly_map"][rows], apart["anomaly_map"], 1e-5)
        close(together["image_score"][rows], apart["image_score"], 1e-4)


@pytest.mark.parametrize("scoring", ["batch", "online"])
def test_autocast_does_not_matter(tiny_clip: CLIPBackbone, scoring: Any) -> None:
    images, method = random_images(6), small(tiny_clip, scoring=scoring, start=3, memory=4)
    expected = method.score(images, ["a"] * 6)
    with torch.autocast("cpu", torch.bfloat16):
        actual = method.score(images, ["a"] * 6)
    close(actual["anomaly_map"], expected["anomaly_map"], 1e-6)
    close(actual["image_score"], expected["image_score"], 1e-6)


def test_a_sequence_within_start_and_memory_equals_a_batch(tiny_clip: CLIPBackbone) -> None:
    images = random_images(6)
    batch = small(tiny_clip).score(images, ["a"] * 6)
    for start in (6, 20):
        online = small(tiny_clip, scoring="online", start=start, memory=10, k_list=[1])
        scores = online.score(images, ["a"] * 6)
        close(scores["anomaly_map"], batch["anomaly_map"], 1e-5)
        close(scores["image_score"], image_score(batch["anomaly_map"]), 1e-5)


def test_a_grid_averages_the_layers_of_a_cnn(cnn: CNNBackbone) -> None:
    images = random_images(5, 64)
    method = MuSc(cnn, layers=["features.1", "features.3"], image_size=64, grid=4, r_list=[1])
    assert isinstance(method.backbone, CNNBackbone)
    features = method.eval().backbone(images)
    maps = torch.stack(
        [
            mutual_scores(aggregate(resize_grids(features[name], torch.Size((4, 4))), 1))
            for name in ("features.1", "features.3")
        ]
    ).mean(dim=0)
    scores = method.score(images, ["a"] * 5)
    close(scores["anomaly_map"], patches_to_map(maps, (64, 64), align_corners=True), 2e-3)


def test_extreme_features_fit_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = {"fine": 1e6 * torch.randn(2, 5, 4, 4), "coarse": torch.randn(2, 5, 4, 4)}
    backbone = CNNBackbone.__new__(CNNBackbone)
    maps: Any = lambda self, images, layers: [features[name] for name in layers]  # noqa: E731
    monkeypatch.setattr(CNNBackbone, "feature_maps", maps)
    encoded = encode(backbone, ["fine", "coarse"], torch.zeros(2, 3, 8, 8))
    assert torch.equal(encoded["coarse"], features["coarse"])
    assert encoded["fine"].half().isfinite().all()
    close(aggregate(encoded["fine"].half(), 3), aggregate(features["fine"], 3), 2e-3)
    mean = features["coarse"].mean(dim=(2, 3))
    close(class_vectors({k: v.half() for k, v in encoded.items()}), unit(mean), 1e-6)


def test_the_cache_of_features_depends_on_the_code_of_all_towers(
    tiny_clip: CLIPBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(musc_encoder, "source_hash", lambda *files: " ".join(files))
    key = encoder_of(tiny_clip, [1], torch.device("cpu")).key
    for module in (blocks, clip_towers, vit, musc_encoder):
        assert str(module.__file__) in key


def test_features_that_are_not_finite_are_refused() -> None:
    encoder = Encoder(lambda images: {"a": images / 0}, "key", torch.device("cpu"))
    message = "features of an image are NaN or infinite, in b.png: give other backbone weights"
    with pytest.raises(ValueError, match=message):
        halves(encoder, torch.ones(1, 3, 8, 8), "b.png")


@pytest.mark.parametrize("categories", [["a"], ["a", "b", "a"]])
def test_a_category_of_one_image_is_refused(tiny_clip: CLIPBackbone, categories: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"but {categories[-2:][0]} has 1: give at least 2"):
        small(tiny_clip).score(random_images(len(categories)), categories)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5]}, "number of blocks"),
        ({"layers": [4, 2]}, "ascending"),
        ({"r_list": []}, "model.r_list is empty"),
        ({"r_list": [1, 4]}, "a neighbourhood of 4"),
        ({"scoring": "offline"}, "model.scoring"),
        ({"grid": 0}, "model.grid"),
        ({"start": 1}, "model.start"),
        ({"feature_cache_gb": -1}, "model.feature_cache_gb"),
        ({"image_size": 64}, "model.image_size 64 differs"),
    ],
)
def test_wrong_settings(tiny_clip: CLIPBackbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tiny_clip, **options)


def test_layers_of_a_cnn_are_listed_finest_first(cnn: CNNBackbone) -> None:
    with pytest.raises(ValueError, match="finest layer first"):
        MuSc(cnn, layers=["features.3", "features.1"])
    with pytest.raises(ValueError, match="spatial layers"):
        MuSc(cnn, layers=["features.99"])
    with pytest.raises(ValueError, match="names a layer twice"):
        MuSc(cnn, layers=["features.1", "features.1"])


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            {"name": "resnet18", "weights": "random", "image_size": 64},
            "image_size is no option of a",
        ),
        ({"name": "demo", "pretrained": "demo", "mean": [0, 0, 0]}, "mean is no option of a CLIP"),
        (
            {"name": "resnet18", "pretrained": "random"},
            "resnet18 is a CNN: give its weights with model.backbone.weights",
        ),
        (
            {"name": "vit_tiny_patch16_224", "pretrained": "random"},
            "is a ViT without texts: give its weights with model.backbone.weights",
        ),
        ({"name": "ViT-B-16", "weights": "random"}, "ViT-B-16 is a CLIP model: give its weights"),
        (CNNSettings("demo", "random"), "demo is a CLIP model"),
        ("resnet18", "backbone 'resnet18': give its settings"),
        (None, "backbone NoneType: give its settings"),
    ],
)
def test_settings_of_both_kinds_of_backbone(backbone: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuSc(backbone)


def test_patches_of_a_vit_are_those_after_its_final_norm() -> None:
    """As in the official code for DINO; timm computes the norm itself here."""
    backbone = ViTBackbone("test_vit", "random", 64)
    norm: Any = backbone.model.norm
    torch.nn.init.uniform_(norm.weight)  # that of random weights scales all channels alike
    images = torch.randn(2, 3, 64, 64)
    encoded = encode(backbone, [2, 5], images)
    expected: Any = backbone.model.forward_intermediates(images, [1, 4], norm=True)
    for layer, grid in zip(("2", "5"), expected[1], strict=True):
        assert_close(encoded[layer], grid)
