from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.tab_prompts import PROMPT_SETS, TABPrompts, text_matrices
from anomaly_clip.methods.tab_heads import mean_cosine


@pytest.mark.golden
def test_golden_texts(golden: Callable[[str], Golden]) -> None:
    folder = golden("detectors").folder
    arrays = load_file(folder / "tab.safetensors")
    listed = json.loads((folder / "tab_sentences.json").read_text())
    official = TABPrompts("first_release", names="keep", text_layout="official_reshape")
    first = re.escape(official.for_category("NAME")[0][0]).replace("NAME", "(.+)")
    names = [match.group(1) for prompt in listed if (match := re.fullmatch(first, prompt))]
    generated = [s for name in names for side in official.for_category(name) for s in side]
    assert list(dict.fromkeys(generated)) == listed
    rows = dict(zip(listed, arrays["sentence_embeddings"], strict=True))

    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.stack([rows[prompt] for prompt in prompts])

    scrambled = text_matrices(encode, names, official)
    assert scrambled.abnormal is not None
    expected = arrays["text_normal_official_reshape"], arrays["text_abnormal_official_reshape"]
    assert_close(scrambled.normal, expected[0], atol=1e-5, rtol=0)
    assert_close(scrambled.abnormal, expected[1], atol=1e-5, rtol=0)
    plain = text_matrices(encode, names, TABPrompts("first_release", names="keep"))
    undone = expected[0].reshape(expected[0].shape[::-1]).T
    assert_close(plain.normal, undone, atol=1e-5, rtol=0)
    assert_close(plain.normal.norm(dim=1), torch.ones(len(names)))


@pytest.mark.parametrize(
    ("preset", "normal", "abnormal"),
    [
        ("one_class", 1, 0),
        ("two_class", 1, 1),
        ("state_ensemble", 7, 7),
        ("clip_template", 7 * 38, 7 * 38),
        ("idpa", 7 * 32, 7 * 32),
        ("first_release", 6 * 38, 6 * 38),
    ],
)
def test_number_of_prompts_per_preset(preset: Any, normal: int, abnormal: int) -> None:
    both = TABPrompts(preset).for_category("metal_nut")
    assert tuple(map(len, both)) == (normal, abnormal)
    assert all("metal nut" in prompt for side in both for prompt in side)
    assert len(PROMPT_SETS) == 6


def test_positions_apply_to_defects_only() -> None:
    normal, abnormal = TABPrompts("two_class", positions=True).for_category("nut")
    assert normal == ["normal nut."]
    assert len(abnormal) == 6
    assert abnormal[0] == "defect nut. which defect is on the left of it"


@pytest.mark.parametrize("centered", ["sides", "all"])
def test_centered_texts(centered: Any) -> None:
    """A large component shared by all prompts is removed."""
    rng = np.random.default_rng(0)
    shared = 100 * rng.normal(size=16)
    offsets = {True: rng.normal(size=(3, 16)), False: rng.normal(size=(3, 16))}
    names = ["wood", "steel", "glass"]

    def encode(prompts: Sequence[str]) -> Tensor:
        normal = "normal" in prompts[0]
        rows = offsets[normal][names.index(prompts[0].split()[1].rstrip("."))]
        return torch.from_numpy(np.tile(shared + rows, (len(prompts), 1))).float()

    plain = text_matrices(encode, names, TABPrompts("two_class"))
    assert mean_cosine(plain.normal) > 0.99
    texts = text_matrices(encode, names, TABPrompts("two_class", centered=centered))
    assert texts.abnormal is not None
    length = np.linalg.norm(shared + offsets[True], axis=1, keepdims=True)
    normal = (shared + offsets[True]) / length
    abnormal = shared + offsets[False]
    abnormal /= np.linalg.norm(abnormal, axis=1, keepdims=True)
    mean = normal.mean(0) if centered == "sides" else np.concatenate([normal, abnormal]).mean(0)
    expected = normal - mean
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(texts.normal.numpy(), expected, atol=1e-4)
    assert mean_cosine(texts.normal) < 0.9
    one_class = text_matrices(encode, names, TABPrompts("one_class", centered=centered))
    assert one_class.abnormal is None
