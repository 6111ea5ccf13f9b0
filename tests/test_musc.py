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

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.maps import image_score, patches_to_map
from anomaly_clip.methods import MuSc
from anomaly_clip.methods.mutual_scoring import aggregate, mutual_scores, rescore
from anomaly_clip.metrics import Evaluator, EvaluatorSettings
from anomaly_clip.records import Scores

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
    vectors = unit(encoded["image"].float() + encoded["image_rest"])
    close(vectors, arrays.expected["e2e.class_tokens"], 1e-5)
    named = arrays.named("e2e.msm.r")
    assert len(named) == len(arrays.meta["layers"]) * len(arrays.meta["r_list"])
    for name, expected in named.items():
        r, _, layer = name.partition(".")
        features = aggregate(encoded[layer], int(r))
        close(mutual_scores(features, arrays.meta["interval"]), expected, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["e2e", "e2e_divided"])
def test_golden_scores(arrays: Golden, official: MuSc, images: Tensor, name: str) -> None:
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
    vectors = unit(encoded["image"].float() + encoded["image_rest"])
    scores = rescore(image_score(maps), vectors, arrays.meta["e2e_k_list"])
    close(scores, expected["score"], 1e-3)
    if len(parts) == 1:
        close(scored[0]["image_score"], expected["score"], 1e-3)


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
