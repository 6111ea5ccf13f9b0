"""Tests of APRIL-GAN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.methods import APRILGAN
from anomaly_clip.methods.april_gan import distances

Arrays = Callable[[str], Golden]


@pytest.fixture(scope="module")
def golden_tower(golden: Arrays) -> CLIPBackbone:
    """Return the CLIP that produced the golden arrays."""
    arrays = golden("april_gan")
    config, weights = (
        str(arrays.folder / name) for name in ("model_config.json", "state_dict.safetensors")
    )
    return CLIPBackbone(config, weights, arrays.meta["image_size"])


def built(golden: Arrays, tower: CLIPBackbone, **options: Any) -> APRILGAN:
    """Return APRIL-GAN with the golden layers."""
    arrays = golden("april_gan")
    layers, memory = arrays.meta["layers"], arrays.meta["few_shot_layers"]
    file = str(arrays.folder / "linear.pth")
    options = {"layers": layers, "memory_layers": memory, "linear_layers": file, **options}
    return APRILGAN(tower, **options).eval()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


def preprocessed(arrays: Golden, name: str, size: int) -> Tensor:
    """Return golden images as uint8 ``(n, 3, S, S)``, resized as the official transform does."""
    from PIL import Image

    images = [
        Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        for image in arrays.inputs[name]
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@pytest.mark.golden
def test_golden_zero_shot(golden: Arrays, golden_tower: CLIPBackbone) -> None:
    arrays = golden("april_gan")
    expected, name = arrays.expected, arrays.meta["object"]
    close(golden_tower.visual.positional_embedding, expected["encode.positional_embedding"], 1e-5)
    images = preprocessed(arrays, "e2e.images", arrays.meta["image_size"])
    method = built(golden, golden_tower)
    tokens = method.tokens(images[:2], scoring=True)
    close(golden_tower.prepare(images[:2]), expected["e2e.preprocessed"], 1e-5)
    close(tokens["image"], expected["encode.class_token"], 1e-4)
    for layer in method.layers:
        close(tokens[f"raw.{layer}"], expected[f"encode.tokens.{layer}"][:, 1:], 1e-3)
    for category in arrays.meta["objects"]:
        close(method.text(category), expected[f"text.{category}"], 1e-5)
    raw = method.tokens(images, scoring=True)
    for fc, layer in zip(method.fc, method.layers, strict=True):
        logits = 100 * unit(fc(raw[f"raw.{layer}"])) @ method.text(name)  # (B, N, 2)
        close(logits.mT, expected[f"zero_shot.logits.{layer}"].flatten(2), 1e-3)
    scores = method.score(images, [name] * len(images))
    close(scores["anomaly_map"], expected["zero_shot.map"], 2e-4)
    close(scores["image_score"], expected["zero_shot.score"], 1e-4)
    assert "score_parts" not in scores


@pytest.mark.golden
def test_golden_few_shots(golden: Arrays, golden_tower: CLIPBackbone) -> None:
    arrays = golden("april_gan")
    expected, size = arrays.expected, arrays.meta["image_size"]
    images, train = (preprocessed(arrays, f"e2e.{part}images", size) for part in ("", "train_"))
    method = built(golden, golden_tower)
    name = arrays.meta["object"]
    assert arrays.meta["shots"]
    for shots, rows in arrays.meta["shots"].items():
        method._memory[name] = method.remember(train[rows])
        tokens = method.tokens(images, scoring=True)
        for number, layer in enumerate(method.memory_layers):
            memory = [method._memory[name][number]]
            key = f"few_shot_{shots}.memory.{layer}"
            if key in expected:
                close(memory[0], unit(expected[key]), 1e-3)
            distance = expected[f"few_shot_{shots}.distance.{layer}"]
            close(distances(tokens[f"raw.{layer}"], memory), distance, 1e-5)
            close(distances(tokens[f"raw.{layer}"], memory * len(images)), distance, 1e-5)
        scores = method.score(images, [name] * len(images))
        close(scores["anomaly_map"], expected[f"few_shot_{shots}.map"], 2e-4)
        text, highest = scores["score_parts"].T
        scaled = (highest - highest.min()) / (highest.max() - highest.min())
        close(0.5 * (text + scaled), expected[f"few_shot_{shots}.score"], 1e-3)


def test_memory_needs_a_layer(golden_tower: CLIPBackbone) -> None:
    with pytest.raises(ValueError, match=r"layers \[\]"):
        APRILGAN(golden_tower, layers=[2], memory_layers=[])
