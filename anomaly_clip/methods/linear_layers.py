"""Linear layers that project patch tokens into the text space, as SDP+ and APRIL-GAN train them.

One layer per stage of the image tower. Both methods upsample the logits of the patches before the
softmax over normal and abnormal, and sum the probability maps of the stages.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.backbones.state_dicts import state_dict_of
from anomaly_clip.backbones.weight_files import (
    WeightFileError,
    check_floating,
    listed,
    read_content,
)
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.files import write_bytes
from anomaly_clip.losses import dice_loss, focal_loss
from anomaly_clip.maps import patches_to_map
from anomaly_clip.progress import say

__all__ = [
    "APRIL_GAN_KEY",
    "LAYERS_KEY",
    "LAYER_NAME",
    "initial_layers",
    "load_linear_layers",
    "read_linear_layers",
    "segmentation_losses",
    "stage_maps",
    "write_linear_layers",
]

FACTOR = 100.0  # logit scale of the softmax over the two classes
OPTION = "model.linear_layers"
LAYERS_KEY = "linear_layers"
"""Key of the layers in the files of CLIP-AD's authors."""
APRIL_GAN_KEY = "trainable_linearlayer"
"""Key of the layers in the files of APRIL-GAN's authors."""
LAYER_NAME = re.compile(r"(|.*\.)fc\.\d+\.(?:weight|bias)")
"""Name of a tensor of a layer, after the prefixes of wrappers."""
LAYERS_SOURCE = "give the linear_layers.pth that a fit or anomaly_clip export writes"
OTHER_LAYERS = {
    LAYERS_KEY: f"{OPTION} {{file}} has the key {{key}} of APRIL-GAN, whose layers are trained on "
    f"the output of each stage: model.stage_tokens clean reads the same",
    APRIL_GAN_KEY: f"{OPTION} {{file}} has the key {{key}} of CLIP-AD, whose layers are trained on "
    f"other tokens unless model.stage_tokens was clean",
}
"""Message about a file of the other method, by the key of the method in use."""


def initial_layers(backbone: CLIPBackbone, count: int) -> nn.ModuleList:
    """Return linear layers ``W -> D`` with torch's random weights, which depend on the seed alone.

    Args:
        backbone: CLIP with the width ``W`` of the image tower and the dimension ``D`` of the texts.
        count: Number of layers.
    """
    width, dim = backbone.width, backbone.embed_dim
    with torch.random.fork_rng(devices=[]):
        # The initial weights do not depend on earlier random numbers.
        torch.manual_seed(torch.initial_seed())
        return nn.ModuleList(nn.Linear(width, dim) for _ in range(count))


def stage_maps(
    layers: nn.ModuleList, stages: Sequence[Tensor], text: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return the probability maps of the abnormal class, ``(stages, B, *size)``.

    As published, logits are upsampled before they become probabilities.

    Args:
        layers: One linear layer for each stage.
        stages: Patches of the image tower, ``(B, N, W)`` each.
        text: ``(B, D, 2)``, unit columns: normal, abnormal.
        size: Height and width in pixels.
    """
    # The softmax over two classes is the sigmoid of the difference of their logits.
    direction = (text[..., 1] - text[..., 0]).unsqueeze(-1)
    maps = []
    for layer, tokens in zip(layers, stages, strict=True):
        dtype = next(layer.parameters()).dtype  # half precision with the precision bf16-true
        logits = FACTOR * (unit(layer(tokens.to(dtype))) @ direction).squeeze(-1)
        maps.append(patches_to_map(logits, size, align_corners=True).sigmoid())
    return torch.stack(maps)


def segmentation_losses(maps: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the focal and the dice loss, each summed over the stages.

    Args:
        maps: Probability maps of the abnormal class, ``(stages, B, h, w)``.
        mask: bool ``(B, h, w)``.
    """
    return {
        "focal": torch.stack([focal_loss(stage_map, mask) for stage_map in maps]).sum(),
        "dice": torch.stack([dice_loss(stage_map, mask) for stage_map in maps]).sum(),
    }


def write_linear_layers(layers: nn.ModuleList, file: Path, key: str) -> None:
    """Write layers in the authors' format, atomically.

    Args:
        layers: The layers.
        file: The file.
        key: :data:`LAYERS_KEY` or :data:`APRIL_GAN_KEY`.
    """
    state = {f"fc.{name}": value.float().cpu() for name, value in layers.state_dict().items()}
    content = io.BytesIO()
    torch.save({key: state}, content)
    write_bytes(file, content.getbuffer())


def load_linear_layers(layers: nn.ModuleList, file: str, tower: str, key: str) -> dict[str, str]:
    """Load layers from a file; see :func:`read_linear_layers`.

    Args:
        layers: Layers of the shapes that the file must have.
        file: The file.
        tower: Image tower and its stages, for messages.
        key: Key of the method's own files.

    Returns:
        File and sha256.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has a different format, or its layers fit a different backbone.
    """
    path = local_file(file, OPTION, f"; {LAYERS_SOURCE}")
    state = read_linear_layers(path, key)
    current_state = {f"fc.{name}": value for name, value in layers.state_dict().items()}
    shapes, expected = (
        {k: v.shape for k, v in tensors.items()} for tensors in (state, current_state)
    )
    if shapes != expected:
        given, needed = (_width(tensors) for tensors in (state, current_state))
        odd = sorted(shapes.keys() ^ expected.keys())
        if given == needed:
            given = f"{odd[0]} is {'missing' if odd[0] in expected else 'unexpected'}"
        raise ValueError(
            f"model.linear_layers {path}: {given}, but {tower} needs {needed}; use the backbone "
            f"and the choice of blocks that these layers were trained with"
        )
    layers.load_state_dict({name.removeprefix("fc."): state[name] for name in current_state})
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def read_linear_layers(file: Path, key: str = LAYERS_KEY) -> dict[str, Tensor]:
    """Read layers in the authors' format, a dictionary of ``fc.{i}.weight`` and ``fc.{i}.bias``.

    The dictionary of the layers may be bare, below the key of CLIP-AD, of APRIL-GAN or those of
    :func:`~anomaly_clip.backbones.state_dicts.state_dict_of`, and its names may share a prefix.
    Tensors outside the prefix are not used, and named.

    Args:
        file: A file of any form that :mod:`anomaly_clip.backbones.weight_files` reads, or a folder
            with one.
        key: Key of the files of the method that will use the layers. If the file has the other
            method's key, a message says so.

    Returns:
        ``fc.{i}.weight`` ``(D, W)`` and ``fc.{i}.bias`` ``(D,)`` for each layer, in float32.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has a different format, several sets of layers, or quantised ones.
    """
    path = local_file(str(file), OPTION, f"; {LAYERS_SOURCE}")
    try:
        content = read_content(path).content
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {file}: not a file that can be read safely ({error.form}); {error.way_out}, "
            f"or {LAYERS_SOURCE}"
        ) from None
    try:
        state = state_dict_of(content, (key, LAYERS_KEY, APRIL_GAN_KEY))
        prefix = _layers_prefix(state.tensors, key)
        layers = {
            key.removeprefix(prefix): value
            for key, value in state.tensors.items()
            if key.startswith(prefix)
        }
        _check_layers(layers)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {file}: expected a dictionary {key} with the tensors fc.0.weight, "
            f"fc.0.bias and so on, but {error.form}; {error.way_out}"
        ) from None
    if state.others:
        say(f"{OPTION} {file}: {state.container} is used, {', '.join(state.others)} not")
    if unused := [key for key in state.tensors if not key.startswith(prefix)]:
        say(f"{OPTION} {file}: tensors outside the layers are not used: {listed(unused)}")
    [other] = {LAYERS_KEY, APRIL_GAN_KEY} - {key}
    if other in f"{state.container}.{prefix}".split("."):
        say(OTHER_LAYERS[key].format(file=file, key=other))
    return {name: value.float() for name, value in layers.items()}


def _layers_prefix(tensors: Mapping[str, Tensor], key: str) -> str:
    """Return what precedes the names of the layers: empty, or the prefixes of wrappers.

    Args:
        tensors: The tensors of a file.
        key: Key of the method's own files, for messages.

    Raises:
        WeightFileError: If there are no layers, or several sets of them.
    """
    matches = (LAYER_NAME.fullmatch(name) for name in tensors)
    prefixes = list(dict.fromkeys(match[1] for match in matches if match))
    if not prefixes:
        raise WeightFileError(f"it contains {listed(list(tensors))}", LAYERS_SOURCE)
    if len(prefixes) > 1:
        raise WeightFileError(
            f"it contains {len(prefixes)} sets of layers, {' and '.join(map(repr, prefixes[:3]))}",
            f"save one of them under {key} and give that file",
        )
    return prefixes[0]


def _check_layers(layers: Mapping[str, Tensor]) -> None:
    """Check names, dimensions and types of layers.

    Raises:
        WeightFileError: If there are other tensors among them, or they are quantised.
    """
    others = [key for key in layers if not LAYER_NAME.fullmatch(key)]
    if others:
        raise WeightFileError(f"it also contains {listed(others)}", LAYERS_SOURCE)
    for key, value in layers.items():
        if value.ndim != (2 if key.endswith("weight") else 1):
            raise WeightFileError(f"{key} has the shape {tuple(value.shape)}", LAYERS_SOURCE)
    check_floating(layers)


def _width(state: dict[str, Tensor]) -> str:
    """Describe layers by their number and widths."""
    weights = [value for key, value in state.items() if key.endswith("weight")]
    if not weights:
        return "no layers"
    rows, columns = weights[0].shape[0], weights[0].shape[-1]
    return f"{len(weights)} layers from {columns} to {rows} channels"
