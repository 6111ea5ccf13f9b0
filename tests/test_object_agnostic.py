"""Tests of AnomalyCLIP and of the inference of Crane."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Golden
from object_agnostic_methods import golden_method, golden_tower
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.surgery import dense_path
from anomaly_clip.losses import dice_loss, focal_loss

Arrays = Callable[[str], Golden]


@pytest.fixture(scope="module")
def tower(golden: Arrays) -> CLIPBackbone:
    return golden_tower(golden("anomalyclip"))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.golden
def test_golden_paths(golden: Arrays, tower: CLIPBackbone) -> None:
    arrays = golden("anomalyclip")
    expected, image = arrays.expected, arrays.inputs["image"]
    close(tower.visual.positional_embedding, expected["encode.positional_embedding"], 1e-5)
    close(tower.embed(image[:1]), expected["embed"], 1e-3)
    blocks = arrays.meta["dpam_layer"] - 1
    with torch.no_grad():
        paths = list(dense_path(tower, image[:1], blocks))
    numbers = {int(key.split(".")[0]) for key in arrays.named("block.")}
    for number in numbers:
        original, dense = paths[number - 1]
        rows = original.shape[1]  # the last block has the class token only
        close(original, expected[f"block.{number}.ori"][:, :rows], 1e-3)
        close(dense, expected[f"block.{number}.dense"], 1e-3)
    assert len(numbers) > 2


@pytest.mark.golden
@pytest.mark.parametrize("prefix", ["encode", "encode_other"])
def test_golden_tokens(golden: Arrays, tower: CLIPBackbone, prefix: str) -> None:
    arrays = golden("anomalyclip")
    other = arrays.meta["other"]
    options = {"layers": other["layers"], "dense_blocks": other["dpam"] - 1}
    method = golden_method(arrays, tower, **(options if prefix == "encode_other" else {}))
    tokens = method.tokens(arrays.inputs["image"], scoring=True)
    close(tokens["image"], arrays.expected[f"{prefix}.image"], 1e-3)
    assert method.layers
    for layer in method.layers:
        expected = arrays.expected[f"{prefix}.tokens.{layer}"][:, 1:]
        close(tokens[f"patches.{layer}"], expected, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize(("round_deep", "name"), [(True, "official"), (False, "clean")])
@pytest.mark.parametrize("file", ["checkpoint", "checkpoint_without_projections"])
def test_golden_text(
    golden: Arrays, tower: CLIPBackbone, round_deep: bool, name: str, file: str
) -> None:
    arrays = golden("anomalyclip")
    expected = arrays.expected
    method = golden_method(
        arrays,
        tower,
        prompts_file=str(arrays.folder / f"{file}.pth"),
        prompt={"round_deep": round_deep},
    )
    shallow = method.prompts.shallow
    embedded = expected["prompt.embedded"]
    used = shallow.embedded().shape[1]
    close(shallow.embedded(), embedded[:, :used], 1e-6)
    assert int(shallow.last.max()) + 1 == used
    close(method.text(), expected[f"text.{name}"].T, 1e-5)
    blocks = tower.model.transformer.resblocks
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *call: outputs.append(call[2])) for b in blocks]
    method.prompts(tower)
    for hook in hooks:
        hook.remove()
    by_block = arrays.named(f"text_block.{name}.")
    assert by_block.keys() <= {str(number) for number in range(1, 1 + len(blocks))}
    for number, rows in by_block.items():
        close(outputs[int(number) - 1], rows[:, :used], 1e-4)


@pytest.mark.golden
def test_golden_scores(golden: Arrays, tower: CLIPBackbone) -> None:
    arrays = golden("anomalyclip")
    expected, image = arrays.expected, arrays.inputs["image"]
    method = golden_method(arrays, tower, sigma=0.0, prompt={"round_deep": True})
    tokens = method.tokens(image, scoring=True)
    for layer in method.layers:
        patches = torch.nn.functional.normalize(tokens[f"patches.{layer}"], dim=-1)
        probability = method.probability(patches, method.text())
        close(probability, expected[f"similarity.{layer}"][:, 1:, 1], 2e-4)
    scores = method.score(image, ["a"] * len(image))
    close(scores["image_score"], expected["score.image"], 2e-4)
    close(scores["anomaly_map"], expected["map.sum"], 4e-4)
    method.sigma = arrays.meta["sigma"]
    close(method.score(image, ["a"] * len(image))["anomaly_map"], expected["map.smooth"], 4e-4)
    last = golden_method(arrays, tower, sigma=0.0, layers=None)
    layer = last.layers[-1]
    close(last.score(image, ["a"] * len(image))["anomaly_map"], expected[f"map.{layer}"], 2e-4)


@pytest.mark.golden
def test_golden_losses(golden: Arrays) -> None:
    arrays = golden("anomalyclip")
    probability, target = arrays.inputs["loss.prob"], arrays.inputs["loss.target"] > 0
    abnormal = probability[:, 1]
    close(focal_loss(abnormal, target), arrays.expected["loss.focal"], 1e-5)
    close(dice_loss(abnormal, target), arrays.expected["loss.dice_abnormal"], 1e-5)
    close(dice_loss(1 - abnormal, ~target), arrays.expected["loss.dice_normal"], 1e-5)


@pytest.mark.golden
def test_golden_crane(golden: Arrays, tower: CLIPBackbone) -> None:
    arrays = golden("anomalyclip")
    expected, image = arrays.expected, arrays.inputs["image"]
    method = golden_method(
        arrays, tower, layers=None, inference="crane", prompt={"round_deep": True}, sigma=0.0
    )
    close(method.text(), expected["crane.text"].T, 1e-5)
    tokens = method.tokens(image, scoring=True)
    close(tokens["image"], expected["crane.image"], 1e-4)
    close(tokens[f"patches.{method.layers[-1]}"], expected["crane.tokens"], 1e-4)
    scores = method.score(image, ["a"] * len(image))
    close(scores["anomaly_map"], expected["crane.map"], 1e-4)
    close(scores["image_score"], expected["crane.score"], 1e-4)
