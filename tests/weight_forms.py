"""Weights of a tiny CLIP in the forms in which people have them."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from helpers import TINY_CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def write_archive(path: Path, quick_gelu: bool = False, half: bool = False) -> State:
    """Trace a tiny CLIP and save it as a TorchScript archive; return its state dict."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CLIP, quick_gelu=quick_gelu).eval()
    model = model.half() if half else model
    image = torch.zeros(1, 3, 32, 32, dtype=model.logit_scale.dtype)
    inputs = {"encode_image": image, "encode_text": torch.zeros(1, 77, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.trace_module(model, inputs, check_trace=False).save(str(path))
    return state_of(model)


def change_archive(source: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """Copy an archive with other content for some of its entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, changes.get(name, old.read(entry)))
    return target


def to_transformers(state: State) -> State:
    """Return a state dict named as in transformers' CLIPModel."""
    renamed: State = {}
    plain = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "logit_scale": "logit_scale",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2"}
    for key, value in state.items():
        if key in plain:
            renamed[plain[key]] = value
        elif key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif key == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        else:
            tower = "vision_model" if key.startswith("visual.") else "text_model"
            number, *rest = key.removeprefix("visual.").split(".")[2:]
            layer = f"{tower}.encoder.layers.{number}"
            if rest[0] == "attn" and rest[1].startswith("in_proj_"):
                kind = rest[1].removeprefix("in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
            else:
                names = [parts.get(part, part) for part in rest]
                joined = ".".join(names).replace("attn.out_proj", "self_attn.out_proj")
                renamed[f"{layer}.{joined}"] = value
    for tower, count in (("text_model", 77), ("vision_model", 17)):
        renamed[f"{tower}.embeddings.position_ids"] = torch.arange(count)[None]
    return renamed


def to_custom_text(state: State) -> State:
    """Return a state dict named as in open_clip's CustomTextCLIP."""
    return {
        key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": value
        for key, value in state.items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


TAKEN: dict[str, Callable[[State], Any]] = {
    "a state dict": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "an unknown key": lambda s: {"my_clip": s, "epoch": 3},
    "two levels": lambda s: {"model": {"state_dict": s}},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1},
    "clip.": lambda s: prefixed(s, "clip."),
    "three wrappers": lambda s: prefixed(s, "module._orig_mod.model."),
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
    "bfloat16": lambda s: {k: v.bfloat16() for k, v in s.items()},
    "logit scale as a vector": lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1)},
    "CustomTextCLIP": to_custom_text,
    "CustomTextCLIP in DataParallel": lambda s: prefixed(to_custom_text(s), "module."),
    "transformers": to_transformers,
    "transformers in Lightning": lambda s: prefixed(to_transformers(s), "model."),
    "OpenAI's numbers": lambda s: {**s, "input_resolution": torch.tensor(32)},
}
"""Content of files that are taken, by form."""


def write_refused(folder: Path, state: State) -> dict[str, tuple[Path, str]]:
    """Write files that cannot be used; return path and part of the message by form."""
    cases: dict[str, tuple[Path, str]] = {}

    def raw(form: str, name: str, content: bytes, message: str) -> None:
        (folder / name).write_bytes(content)
        cases[form] = folder / name, message

    def saved(form: str, name: str, content: object, message: str) -> None:
        torch.save(content, folder / name)
        cases[form] = folder / name, message

    raw("empty", "empty.pt", b"", "it is empty); download or copy it again")
    raw("empty safetensors", "empty.safetensors", b"", "it is empty")
    raw("text", "text.pt", "Größe\n".encode(), "it is a text file")
    raw("web page", "page.pt", b"\n<!DOCTYPE html><html>", "it is a web page")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    raw("LFS", "lfs.safetensors", lfs, "a pointer of Git LFS, not the file itself); run git lfs")
    raw("zeros", "zeros.pt", bytes(5000), "it begins with zeros")
    raw("gzip", "weights.pt.gz", gzip.compress(b"x"), "it is a gzip archive); unpack it")
    raw("HDF5", "weights.bin", b"\x89HDF\r\n\x1a\n", "it is an HDF5 file")
    raw("noise", "noise.bin", bytes(range(255, 100, -1)), "of no form of weights")
    raw("pickle", "plain.pt", pickle.dumps({"a": 1}), "a Python pickle that torch.save did not")
    whole = {key: value.contiguous() for key, value in state.items()}
    save_file(whole, folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    raw("short", "short.safetensors", content[:-100], "truncated or damaged safetensors file")
    raw("shorter", "shorter.safetensors", content[:100], "it is a truncated safetensors file")
    torch.save(state, folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    raw("truncated", "truncated.pt", content[:-200], "it is truncated: its table of contents")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    content = (folder / "old.pt").read_bytes()
    raw("old and truncated", "cut.pt", content[:-200], "truncated or damaged file of torch.save")
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.writestr("weights/clip.pt", b"")
    cases["zip"] = folder / "weights.zip", "a zip archive of weights/clip.pt); unpack it"
    np.savez(folder / "weights.npz", a=np.zeros(1))
    cases["NumPy"] = folder / "weights.npz", "it is an archive of NumPy arrays"
    with tarfile.open(folder / "weights.tar", "w") as tar:
        tar.add(folder / "text.pt", "text.pt")
    cases["tar"] = folder / "weights.tar", "it is a tar archive); unpack it"
    saved("module", "module.pt", nn.Linear(1, 1), "a whole pickled model: it holds Python objects")
    saved("objects", "objects.pt", {"state_dict": state, "args": Namespace()}, "argparse.Namespace")
    saved("list", "list.pt", [state], "it contains no weights: a list")
    saved("tensor", "tensor.pt", torch.zeros(1), "it contains no weights: a single tensor")
    saved("no tensors", "poor.pt", {"epoch": 1}, "a dictionary with the keys epoch")
    saved("empty dictionary", "nothing.pt", {}, "it contains no weights: an empty dictionary")
    two = {**prefixed(state, "student."), **prefixed(state, "teacher.")}
    saved("two CLIPs", "two.pt", two, "it contains 2 CLIPs, 'student.' and 'teacher.'")
    several = {"encoder": {"a": torch.zeros(1)}, "decoder": {"a": torch.zeros(1)}}
    saved("several", "several.pt", several, "several state dicts: encoder, decoder")
    image_only = {key: value for key, value in state.items() if key.startswith("visual.")}
    saved("image tower", "image.pt", image_only, "an image tower without a text tower: give the")
    timm = {"blocks.0.norm1.weight": torch.zeros(1)}
    saved("timm", "timm.pt", timm, "they look like a ViT of timm or DINO, without a text tower")
    resnet = {"layer1.0.conv1.weight": torch.zeros(1)}
    saved("ResNet", "resnet.pt", resnet, "they look like a ResNet without a text tower")
    layers = {"fc.0.weight": torch.zeros(1, 1)}
    saved("layers", "layers.pt", {"linear_layers": layers}, "look like single linear layers")
    half = {k: v for k, v in to_transformers(state).items() if "q_proj" not in k}
    saved(
        "half of transformers", "half.pt", half, "transformers' CLIPModel, but visual.transformer"
    )
    quantised = {**state, "visual.proj": state["visual.proj"].to(torch.int8)}
    saved(
        "quantised", "int8.pt", quantised, "its tensors are quantised (visual.proj is torch.int8)"
    )
    small = {**state, "visual.proj": state["visual.proj"].to(torch.float8_e4m3fn)}
    saved("8 bits", "fp8.pt", small, "are quantised (visual.proj is torch.float8_e4m3fn)")
    infinite = {**state, "visual.proj": state["visual.proj"].half() * float("inf")}
    saved("infinite", "infinite.pt", infinite, "contain NaN or infinite values (visual.proj")
    hole = state["ln_final.weight"].clone()
    hole[1] = float("nan")
    saved("NaN", "nan.pt", {**state, "ln_final.weight": hole}, "infinite values (ln_final.weight")
    large = {**state, "logit_scale": torch.tensor(1e300, dtype=torch.float64)}
    saved("above float32", "large.pt", large, "infinite values (logit_scale, in float32)")
    eighths = {k: v.to(torch.float8_e5m2) for k, v in to_transformers(state).items()}
    saved("8 bits of transformers", "fp8_hub.pt", eighths, "are quantised (")
    sparse = {**state, "text_projection": state["text_projection"].to_sparse()}
    saved("sparse", "sparse.pt", sparse, "its tensors are sparse (text_projection is")
    meta = {key: value.to("meta") for key, value in state.items()}
    saved("meta", "meta.pt", meta, "its tensors have no values (")
    rows = {**state, "visual.positional_embedding": torch.zeros(1, 24)}
    saved("one position", "row.pt", rows, "Another shape: visual.positional_embedding is (1, 24)")
    empty = {**state, "positional_embedding": torch.zeros(0, 8)}
    saved("no positions", "zero.pt", empty, "Another shape: positional_embedding is (0, 8)")
    towers = {"visual": {"a": torch.zeros(1)}, "text": {"a": torch.zeros(1)}}
    saved("two towers", "towers.pt", towers, "save the state dict of the whole CLIP")
    wide = {**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], "width": 16}}  # type: ignore[dict-item]
    other = state_of(open_clip.CLIP(**wide))
    saved("another width", "wide.pt", other, "Another shape: positional_embedding is (77, 16), not")
    grid = {**state, "visual.positional_embedding": torch.zeros(13, 24)}
    saved("no grid", "grid.pt", grid, "Another shape: visual.positional_embedding is (13, 24)")
    saved("extra", "extra.pt", {**state, "head.weight": torch.zeros(1)}, "Unexpected key head.weig")
    return cases


def write_tiny_config(folder: Path, **more: object) -> str:
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY_CLIP, **more}))
    return str(path)
