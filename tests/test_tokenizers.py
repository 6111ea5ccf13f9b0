"""Tests of the tokenizers of text towers."""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import MEAN, WORDS
from timm_clips import SIGLIP_TEXT, backbone_of, write_tokenizer
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import check_prompts, text_features
from anomaly_clip.backbones.tokenizers import CLIPTokenizer, tokenizer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def siglip(tmp_path: Path, folder: str) -> CLIPBackbone:
    torch.manual_seed(0)
    return backbone_of(tmp_path, "siglip", folder)


def test_prompts_of_siglip_are_padded_and_end_as_its_tokenizer_says(siglip: CLIPBackbone) -> None:
    ids = siglip.tokenize(["A photo of a CUP.", "bad bottle"])
    assert ids.tolist() == [[3, 6, 7, 3, 14, 1, *[0] * 10], [9, 15, 1, *[0] * 13]]


@torch.no_grad()
def test_the_text_embedding_is_that_of_open_clip(siglip: CLIPBackbone, folder: str) -> None:
    prompts = ["a photo of a cup", "bad bottle"]
    options = SIGLIP_TEXT["tokenizer_kwargs"]
    tokenizer = open_clip.tokenizer.HFTokenizer(folder, context_length=16, **options)
    expected = siglip.model.encode_text(tokenizer(prompts))
    assert_close(siglip.encode_text(prompts), expected, atol=1e-6, rtol=1e-5)
    # Without a causal mask, the padding counts, so the length must not depend on other prompts.
    assert_close(siglip.encode_text(prompts[:1]), expected[:1], atol=1e-6, rtol=1e-5)


def test_the_lost_end_of_a_long_prompt(siglip: CLIPBackbone) -> None:
    long = " ".join(["good"] * 14 + ["bad", "cup", "bottle"])
    assert siglip.lost_end(long) == "cup bottle"
    assert siglip.is_cut(long)
    assert siglip.lost_end(" ".join(["good"] * 15)) == ""
    with pytest.warns(UserWarning, match="more than the 16 tokens of CLIP.*loses 'cup bottle'"):
        check_prompts(siglip, "cup", [long], ["bad"])


def test_the_vocabulary_has_whole_words(siglip: CLIPBackbone) -> None:
    assert siglip.vocabulary[:4] == ["an", "bad", "bottle", "cup"]


def test_stored_text_features_depend_on_the_tokenizer(
    siglip: CLIPBackbone, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CLIPBackbone, "is_random", False)
    first = text_features(siglip, "cup", WORDS, MEAN)
    assert torch.equal(text_features(siglip, "cup", WORDS, MEAN), first)
    tokenize = siglip.tokenizer.__call__
    monkeypatch.setattr(type(siglip.tokenizer), "__call__", lambda _, texts: 1 + tokenize(texts))
    assert not torch.allclose(text_features(siglip, "cup", WORDS, MEAN), first)


def test_clips_tokenizer_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    tokenizer = tokenizer_of("ViT-B-16", {"context_length": 9})
    assert isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer(["a photo"]).shape == (1, 9)
    assert tokenizer.lost_end("a b c d e f g h i") == "h i"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(tmp_path, "siglip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'anomaly_clip\[siglip\]', or choose"):
        backbone.tokenize(["a"])


def test_files_that_are_not_in_the_cache(tmp_path: Path) -> None:
    backbone = backbone_of(tmp_path, "siglip")
    message = "tokenizer nobody/no-such-tokenizer is not in the model hub's cache and cannot be"
    with pytest.raises(FileNotFoundError, match=message):
        backbone.tokenize(["a"])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    backbone = backbone_of(tmp_path, "siglip", str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match=r"cannot be read as a tokenizer .*; it needs tokenizer.js"
    ):
        backbone.tokenize(["a"])
