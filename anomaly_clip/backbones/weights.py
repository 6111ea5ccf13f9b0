"""CLIP weights from an open_clip tag, a local file, ``demo``, or untrained (``random``).

Every result depends on the weights, so nothing is guessed. A tag that cannot be downloaded, a tag
that was trained with a different activation and a file that does not fit the model are errors with
a one-line message. Random weights are used only if requested by name. ``demo`` is the small CLIP of
this project, trained on generated images (see its card, ``assets/demo_clip.md``). A bare weights
file specifies neither activation nor pixel normalisation: the activation follows from the model
name (``-quickgelu`` for OpenAI's weights), the normalisation is CLIP's.

Importing this module loads open_clip, which takes two seconds. Other modules therefore import this
module inside functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.convert import convert_state_dict
from open_clip.factory import load_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

from anomaly_clip.errors import suggest
from anomaly_clip.records import DEMO, RANDOM

__all__ = ["LoadedCLIP", "load_clip"]

ASSETS = Path(str(resources.files("anomaly_clip") / "assets"))

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
HUB_TIMEOUT = 5.0
"""Seconds to wait for an answer of the model hub; our choice, short because a user is waiting."""


class LoadedCLIP(NamedTuple):
    """An open_clip model with its pixel normalisation."""

    model: open_clip.CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_clip(name: str, pretrained: str, image_size: int | None = None) -> LoadedCLIP:
    """Build an open_clip model and load its weights.

    Args:
        name: An open_clip model name, the path of a JSON model configuration, or ``demo`` for the
            architecture of the small CLIP that comes with the project.
        pretrained: An open_clip tag (downloaded on first use), the path of a ``.safetensors`` or
            ``.pt`` file, ``demo`` for the weights that come with the project, or ``random``.
        image_size: Side of the input in pixels; positional embeddings are interpolated to it.
            Default: the image size of the model.

    Raises:
        FileNotFoundError: If a file is missing, or the weights of a tag are neither cached nor
            downloadable.
        ValueError: If the model is unknown, its image tower is not a plain ViT, or the weights do
            not fit the model.
    """
    if pretrained in (None, "", "None", "null"):
        raise ValueError(
            f"backbone.pretrained of {name} is empty; give an open_clip tag, a weights file, "
            f"'{DEMO}', or '{RANDOM}' for untrained weights"
        )
    config, preprocessing = _read_config(name)
    if image_size is not None:
        patch = config["vision_cfg"].get("patch_size", 16)
        if image_size < patch or image_size % patch:
            raise ValueError(
                f"backbone.image_size {image_size} is not a multiple of the patch size {patch} of "
                f"{name}; use {max(1, round(image_size / patch)) * patch}, for example"
            )
        config["vision_cfg"]["image_size"] = image_size
    checkpoint: Path | None = None
    if pretrained == DEMO:
        if name != DEMO:
            raise ValueError(
                f"backbone.pretrained {DEMO} has an architecture of its own, not that of {name}; "
                f"omit backbone.name, or set it to {DEMO}"
            )
        checkpoint = ASSETS / "demo_clip.safetensors"
    elif pretrained != RANDOM:
        if _looks_like_file(pretrained):
            checkpoint = _existing_file(pretrained)
        else:
            tag = _pretrained_tag(name, pretrained, bool(config.get("quick_gelu", False)))
            checkpoint = _fetch(name, pretrained, tag)
            preprocessing = tag
    model = _build(name, config)
    if checkpoint is not None:
        _fill(model, checkpoint, name)
    mean = tuple(preprocessing.get("mean") or OPENAI_DATASET_MEAN)
    std = tuple(preprocessing.get("std") or OPENAI_DATASET_STD)
    return LoadedCLIP(model, mean, std)


def _read_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's configuration and its preprocessing settings."""
    preprocessing: dict[str, Any] = {}
    if name == DEMO or name.endswith(".json"):
        path = ASSETS / "demo_clip.json" if name == DEMO else Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"backbone.name {name}: there is no such file; give an existing JSON model "
                f"configuration or an open_clip model name"
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"backbone.name {name}: not a JSON model configuration ({error}); give one in "
                f"open_clip's format"
            ) from None
        if "model_cfg" in config:  # the format in which open_clip publishes models
            preprocessing = config.get("preprocess_cfg", {})
            config = config["model_cfg"]
    else:
        registered = open_clip.get_model_config(name)
        if registered is None:
            hint = suggest(name, open_clip.list_models()) or "use a ViT, such as ViT-B-16"
            raise ValueError(f"backbone.name {name}: open_clip has no such model; {hint}")
        config = deepcopy(registered)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise ValueError(
            f"backbone.name {name}: the configuration lacks {sorted(missing)}; add them, as in "
            f"open_clip's model configurations"
        )
    return config, preprocessing


def _looks_like_file(pretrained: str) -> bool:
    return pretrained.endswith(WEIGHT_FILES) or "/" in pretrained or "\\" in pretrained


def _existing_file(pretrained: str) -> Path:
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone.pretrained {pretrained}: there is no such file; give an existing weights "
            f"file"
        )
    return path


def _pretrained_tag(name: str, tag: str, quick_gelu: bool) -> dict[str, Any]:
    """Return open_clip's record of a tag, after checking that it fits the model."""
    if name == DEMO or name.endswith(".json"):
        model = "the demo architecture" if name == DEMO else "a model from a JSON configuration"
        demo = f"'{DEMO}', " if name == DEMO else ""
        raise ValueError(
            f"backbone.pretrained {tag}: {model} has no tags; give {demo}a weights file or "
            f"'{RANDOM}'"
        )
    record: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not record:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"backbone.pretrained {tag} is not a tag of {name} (known: {tags}); give one of them, "
            f"a weights file, or '{RANDOM}'"
        )
    if bool(record.get("quick_gelu", False)) != quick_gelu:
        other = name.removesuffix("-quickgelu") + ("" if quick_gelu else "-quickgelu")
        raise ValueError(
            f"backbone.pretrained {tag} was trained with a different activation from that of "
            f"{name}; use backbone.name {other}"
        )
    return record


def _fetch(name: str, tag: str, record: dict[str, Any]) -> Path:
    """Return the local weights file of a tag; download it if it is not cached."""
    from huggingface_hub import constants

    repository, _ = str(record.get("hf_hub") or "/").rsplit("/", 1)
    cached = _cached_file(record)
    if cached is not None:
        return cached
    address = f"{constants.ENDPOINT}/{repository}" if repository else str(record.get("url"))
    reason = "offline mode is set" if constants.HF_HUB_OFFLINE else _unreachable(address)
    if reason is None:
        try:
            return Path(open_clip.download_pretrained(record))
        except Exception as error:  # every download library has its own exceptions
            reason = str(error).splitlines()[0]
    folder = constants.HF_HUB_CACHE if repository else Path("~/.cache/clip").expanduser()
    raise FileNotFoundError(
        f"backbone.pretrained {tag} of {name} is not in {folder} and cannot be downloaded "
        f"({reason}); copy that cache from a machine with network access, give a weights file "
        f"(--model.backbone.pretrained FILE.safetensors), or try the pipeline with the bundled "
        f"small CLIP (--model.backbone.name {DEMO} --model.backbone.pretrained {DEMO}) or with "
        f"untrained weights ('{RANDOM}')"
    )


def _cached_file(record: dict[str, Any]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if record.get("file"):
        return Path(record["file"])
    if not record.get("hf_hub"):
        file = Path("~/.cache/clip").expanduser() / str(record.get("url", "")).rsplit("/", 1)[-1]
        return file if file.is_file() else None
    repository, _, filename = str(record["hf_hub"]).rpartition("/")
    names = [filename] if filename else []
    names += ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for candidate in names:
        path = try_to_load_from_cache(repository, candidate)
        if isinstance(path, str):
            return Path(path)
    return None


def _unreachable(address: str) -> str | None:
    """Return why an address does not answer, or None if it answers, even with an HTTP error."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"no answer from {urllib.request.urlparse(address).hostname}: {_short(error)}"  # type: ignore[attr-defined]
    return None


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", error)).strip("<>")


def _build(name: str, config: dict[str, Any]) -> open_clip.CLIP:
    """Build the model; only ViTs with open_clip's plain blocks are supported."""
    unsupported = ValueError(
        f"backbone.name {name} is not supported; use a CLIP with a plain ViT image tower and a "
        f"causal text tower, such as ViT-B-16-plus-240, ViT-B-16 or ViT-L-14-336"
    )
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or config.get("custom_text"):
        raise unsupported
    # Untrained weights depend only on the run's seed, not on earlier random numbers. Their
    # initialisation does not affect later random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        try:
            model = open_clip.CLIP(**config)
        except TypeError as error:
            raise ValueError(
                f"backbone.name {name}: open_clip cannot build this configuration ({error}); "
                f"correct it, or use an open_clip model name"
            ) from None
    visual = model.visual
    plain = (
        isinstance(visual, VisionTransformer)
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.final_ln_after_pool
        and isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock)
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
    )
    if not plain:
        raise unsupported
    return model


def _fill(model: open_clip.CLIP, checkpoint: Path, name: str) -> None:
    """Load a state dict strictly; reject files that could run code."""
    if checkpoint.suffix not in WEIGHT_FILES:
        raise ValueError(
            f"backbone.pretrained {checkpoint}: expected a file name that ends with one of "
            f"{', '.join(WEIGHT_FILES)}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            state = load_state_dict(str(checkpoint), device="cpu", weights_only=True)
        state = convert_state_dict(model, state)
        # CPUs cannot interpolate in half precision; some files store the logit scale as a vector.
        state = {key: value.float() for key, value in state.items()}
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
        model.load_state_dict(state)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported global" in str(error):
            why = (
                "it holds Python objects besides tensors, which could run code, and is rejected; "
                "save the bare state dict and give that file"
            )
        elif isinstance(error, RuntimeError) and "state_dict" in str(error):
            why = (
                f"its tensors do not fit {name} ({_first_mismatch(str(error))}); set backbone.name "
                f"to the model that they belong to"
            )
        else:
            why = (
                f"it cannot be read as weights ({str(error).splitlines()[0]}); give a file with a "
                f"state dict"
            )
        raise ValueError(f"backbone.pretrained {checkpoint}: {why}") from None


def _first_mismatch(message: str) -> str:
    lines = [line.strip().rstrip(".") for line in message.splitlines()[1:] if line.strip()]
    first = lines[0] if lines else message
    return first if len(first) < 200 else f"{first[:200]}..."
