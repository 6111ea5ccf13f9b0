"""Frozen convolutional backbones from torchvision, for the feature-based detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.cnn_layers import HEADS, describe_layers, stride_of
from anomaly_clip.backbones.frozen import FrozenBackbone, check_settings
from anomaly_clip.backbones.state_dicts import check_keys, only_prefix, state_dict_of
from anomaly_clip.backbones.weight_files import (
    WeightFileError,
    check_floating,
    in_one_sentence,
    read_content,
)
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.errors import reason, suggest
from anomaly_clip.progress import say
from anomaly_clip.records import RANDOM

__all__ = [
    "IMAGENET",
    "MEAN",
    "STD",
    "CNNBackbone",
    "CNNSettings",
    "ImagewiseMaxPool2d",
    "load_network",
    "read_state",
    "replace_max_pooling",
]

IMAGENET = "imagenet"
"""Value of ``weights`` that selects torchvision's ImageNet weights."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("layer1", "layer2", "layer3", "layer4")
NODES = {**{stage: stage for stage in STAGES}, "pooled": "flatten"}
"""Mapping from ResNet layers in our options to the nodes of torchvision's graph."""

OPTION = "backbone.weights"
PREFIXES = (
    *("module.", "model.", "backbone.", "encoder.", "network.", "visual.", "resnet."),
    *("_orig_mod.", "encoder_q.", "net."),
)
PREFERRED = ("encoder_q.",)
"""Prefix of the trained encoder in files with several of them, as in MoCo's."""
PROBE = 256  # side in pixels of the image used to measure feature shapes


@dataclass(frozen=True)
class CNNSettings:
    """Choice of CNN, as plain values that configurations and checkpoints can store.

    Args:
        name: A torchvision model.
        weights: imagenet (IMAGENET1K_V1 as in the papers, downloaded on first use); a weights file
            (from TAB's export, torchvision or timm; forms: docs/weights.md); or the word random
            (untrained: the metrics mean nothing).
        layers: Layers whose features are returned. A ResNet has layer1 to layer4 and pooled; null
            selects these five. For any model, a layer can be a node of torchvision's graph, such
            as features.7.cat; --model.backbone.help lists the layers of a model.
        mean: Pixel mean.
        std: Pixel standard deviation.
    """

    name: str = "resnet18"
    weights: str = IMAGENET
    layers: list[str] | None = None
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))

    @classmethod
    def of(cls, settings: CNNSettings | Mapping[str, Any]) -> CNNSettings:
        """Return settings as they are, or from a mapping, as checkpoints have them.

        Raises:
            ValueError: If they are neither.
        """
        if isinstance(settings, CNNSettings):
            return settings
        check_settings(settings, "name")
        return cls(**settings)


class CNNBackbone(FrozenBackbone):
    """A frozen torchvision model that returns the features of selected layers.

    The features of a ResNet stage are those of its last block, after the ReLU; ``pooled`` is the
    spatial average of the last stage.

    Args:
        name: A torchvision model; all arguments are those of :class:`CNNSettings`.
        weights: Source of the weights.
        layers: Layers whose features are returned.
        mean: Pixel mean.
        std: Pixel standard deviation.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If the model or a layer is unknown, or the weights do not fit the model.
    """

    def __init__(
        self,
        name: str = "resnet18",
        weights: str = IMAGENET,
        layers: Sequence[str] | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__(mean, std)
        from torchvision.models.feature_extraction import create_feature_extractor

        self.settings = CNNSettings(
            name, weights, None if layers is None else list(layers), list(mean), list(std)
        )
        model = load_network(name, weights)
        nodes = _nodes(model, name, layers)
        self.features = create_feature_extractor(model.eval(), nodes).requires_grad_(False).eval()
        replace_max_pooling(self.features)
        shapes = self._probe()
        self.channels: dict[Any, int] = {layer: shape[1] for layer, shape in shapes.items()}
        """Number of channels per layer."""
        self.strides: dict[Any, int] = {
            layer: stride_of(shape, PROBE) for layer, shape in shapes.items() if len(shape) == 4
        }
        """Stride in pixels per spatial layer."""

    def _probe(self) -> dict[str, torch.Size]:
        """Return the feature shape of each layer, for one image.

        Raises:
            ValueError: If the shapes are not those of a convolutional network.
        """
        name = self.settings.name
        try:
            with torch.no_grad():
                black = torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8)
                shapes = {k: v.shape for k, v in self(black).items()}
        except (AssertionError, RuntimeError) as error:  # such as a transformer of fixed size
            raise ValueError(
                f"backbone.name {name} does not accept images of {PROBE} pixels ({reason(error)}); "
                f"{describe_layers(name)}"
            ) from None
        for layer, shape in shapes.items():
            square = len(shape) == 4 and shape[2] == shape[3]
            if not (square or len(shape) == 2):  # such as tokens, or channels last
                raise ValueError(
                    f"backbone.layers: {layer} of {name} has the shape {tuple(shape)}, not (B, C, "
                    f"h, w); {describe_layers(name)}"
                )
        return shapes

    def check_layers(self, layers: Sequence[str]) -> list[str]:
        """Return layers as a list, after checking that their feature maps can be used together.

        Raises:
            ValueError: If no layer is given, a layer is not spatial or not returned, or the layers
                are not ordered from fine to coarse.
        """
        unknown = [layer for layer in layers if layer not in self.strides]
        if unknown or not layers:
            names = ", ".join(self.strides) or "--model.backbone.help lists them"
            raise ValueError(
                f"model.layers must name spatial layers of the backbone ({names}), got "
                f"{list(layers)}"
            )
        strides = [self.strides[layer] for layer in layers]
        if strides != sorted(strides):
            raise ValueError(
                f"model.layers must list the finest layer first, got {list(layers)} with strides "
                f"{strides}"
            )
        return list(layers)

    @classmethod
    def of(cls, settings: CNNBackbone | CNNSettings | Mapping[str, Any]) -> CNNBackbone:
        """Return a ready backbone as it is, or build one from its settings."""
        if isinstance(settings, CNNBackbone):
            return settings
        return cls(**asdict(CNNSettings.of(settings)))

    @property
    def label(self) -> tuple[str, str]:
        """Names of the architecture and of the weights' source."""
        return self.settings.name, self.settings.weights

    @property
    def is_random(self) -> bool:
        """True if the weights are untrained and the metrics therefore mean nothing."""
        return self.settings.weights == RANDOM

    @property
    def network(self) -> nn.Module:
        """The model up to the last returned layer."""
        return self.features

    @property
    def tower(self) -> nn.Module:
        """The same module as :attr:`network`."""
        return self.features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each layer, ``(B, C, h, w)``, or ``(B, C)`` if pooled.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.

        Raises:
            ValueError: If the images are not ``(B, 3, H, W)``.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"CNNBackbone {self.settings.name}: expected images (B, 3, H, W), got "
                f"{tuple(images.shape)}"
            )

        def run(images: Tensor) -> dict[str, Tensor]:
            with self.out_of_autocast():
                features: dict[str, Tensor] = self.features(self.normalise(images))
            return features

        return self.replayed(run, "features", images)

    def feature_maps(
        self, images: Tensor, layers: Sequence[str], *, norm: bool = False
    ) -> list[Tensor]:
        """Return the features of spatial layers, ``(B, C, h, w)`` each.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            layers: Names of layers.
            norm: No effect, as CNNs have no final norm.
        """
        features = self(images)
        return [features[layer] for layer in layers]


class ImagewiseMaxPool2d(nn.MaxPool2d):
    """Max-pooling of one image at a time with channels last; the values are those of the base.

    torch uses vector instructions for max-pooling on CPUs only if channels are last. The copies of
    one image stay in the cache.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Pool features ``(B, C, H, W)``."""
        if features.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(features)
        return torch.cat([self._pool(image) for image in features.split(1)])

    def __repr__(self) -> str:
        """Return the text of the base, which is hashed with the weights of a network."""
        return f"{nn.MaxPool2d.__name__}({self.extra_repr()})"

    def _pool(self, features: Tensor) -> Tensor:
        last = features.contiguous(memory_format=torch.channels_last)
        return super().forward(last).contiguous()


def replace_max_pooling(network: nn.Module) -> None:
    """Replace all max-pooling layers of a network on images by faster ones."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.MaxPool2d and not module.return_indices:
            faster = ImagewiseMaxPool2d(
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                ceil_mode=module.ceil_mode,
            )
            network.set_submodule(name, faster.train(module.training))


def load_network(name: str, weights: str) -> nn.Module:
    """Return a torchvision model, including its classifier.

    Args:
        name: Name of the model.
        weights: As for :class:`CNNSettings`.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If the model is unknown, or the weights do not fit it.
    """
    model = _build(name)
    if weights in (None, "", "None", "null"):
        raise ValueError(
            f"backbone.weights of {name} is empty; give '{IMAGENET}', a weights file, or "
            f"'{RANDOM}' for untrained weights"
        )
    with in_one_sentence(f"{OPTION} {weights}"):
        if weights == IMAGENET:
            _fill(model, _imagenet_state(name), f"{OPTION} {IMAGENET}", name)
        elif weights != RANDOM:
            _fill(model, read_state(weights), f"{OPTION} {weights}", name)
    if weights != RANDOM and hasattr(model, "transform_input"):
        # The weights of GoogLeNet and Inception expect a different pixel normalisation.
        model.transform_input = True  # type: ignore[assignment]
    return model


def read_state(
    file: str | Path, others: str = f", '{IMAGENET}' or '{RANDOM}'", preferred: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read a state dict and strip known prefixes that all of its keys have.

    Args:
        file: A file of any form that :mod:`anomaly_clip.backbones.weight_files` reads, or a folder
            with one.
        others: Other values of the option, for messages.
        preferred: Keys of the state dict to use of several in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file contains no weights, or pickled objects that could run code.
    """
    path = local_file(str(file), OPTION, others)
    try:
        state = state_dict_of(read_content(path).content, preferred)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {file} cannot be read safely as weights ({error.form}); {error.way_out}"
        ) from None
    if state.others:
        say(f"{OPTION} {file}: {state.container} is used, {', '.join(state.others)} not")
    tensors = state.tensors
    while True:
        common = [p for p in PREFIXES if all(key.startswith(p) for key in tensors)]
        if not common:
            return tensors
        tensors = {key.removeprefix(common[0]): value for key, value in tensors.items()}


def _build(name: str) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        hint = suggest(name, names) or "use a ResNet, such as resnet18"
        raise ValueError(f"backbone.name {name}: torchvision has no such model; {hint}")
    # Untrained weights depend only on the run's seed; their initialisation does not affect later
    # random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        model: nn.Module = models.get_model(name, weights=None)
    return model


def _imagenet_state(name: str) -> dict[str, Tensor]:
    from huggingface_hub import constants
    from torchvision import models

    entries = models.get_model_weights(name)
    weights = (
        entries["IMAGENET1K_V1"] if "IMAGENET1K_V1" in entries.__members__ else entries.DEFAULT
    )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    if file.is_file():
        return read_state(file)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is set")
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except RuntimeError as error:  # the hash does not match
        raise ValueError(
            f"backbone.weights {IMAGENET}: the download of {file.name} is corrupt "
            f"({reason(error)}); try again, or give a weights file (--model.backbone.weights FILE)"
        ) from None
    except OSError as error:
        raise FileNotFoundError(
            f"backbone.weights {IMAGENET}: {file.name} is not in {folder} and cannot be downloaded "
            f"({reason(error)}); copy the file from a machine with network access, give a "
            f"weights file (--model.backbone.weights FILE), or try the pipeline with '{RANDOM}'"
        ) from None
    return state


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Load a state dict; all keys except those of the classifier must match.

    Raises:
        ValueError: If they do not, the state dict contains several networks, or its tensors are
            quantised, sparse or not finite.
    """
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS)}
    counters = [key for key in expected if key.endswith("num_batches_tracked")]
    state = _within_wrapper(state, [key for key in expected if key not in counters], source)
    given = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    check_keys(given, expected, source, name, optional=counters)
    try:
        # Others, such as the indices of Swin, are integers in the model, too.
        check_floating({k: v for k, v in given.items() if expected[k].is_floating_point()})
    except WeightFileError as error:
        raise ValueError(f"{source}: {error.form}; {error.way_out}") from None
    model.load_state_dict(given, strict=False)


def _within_wrapper(
    state: Mapping[str, Tensor], keys: Sequence[str], source: str
) -> Mapping[str, Tensor]:
    """Return the part of a state dict below the prefix under which it has all keys.

    This is the image encoder of a model that contains more, such as TAB's, with its logit scale, or
    MoCo's, with a second encoder.

    Raises:
        ValueError: If several prefixes have all keys.
    """
    first = keys[0]
    candidates = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    prefixes = [p for p in candidates if all(p + key in state for key in keys)]
    if first in state or not prefixes:
        return state
    prefix = only_prefix(prefixes, PREFERRED, source)
    unused = [key for key in state if not key.startswith(prefix)]
    say(f"{source}: {prefix.rstrip('.')} is used, {len(unused)} other tensors are not")
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _nodes(model: nn.Module, name: str, layers: Sequence[str] | None) -> dict[str, str]:
    """Return the graph nodes to extract, and the layer name of each."""
    from torchvision.models.feature_extraction import get_graph_node_names

    is_resnet = all(hasattr(model, stage) for stage in STAGES)
    if layers is not None and not layers:
        raise ValueError(f"backbone.layers of {name} is empty; give at least one layer")
    if layers is None:
        if not is_resnet:
            raise ValueError(f"backbone.layers of {name} is not set; {describe_layers(name)}")
        return {node: layer for layer, node in NODES.items()}
    graph = get_graph_node_names(model)[1]
    nodes = {}
    for layer in layers:
        node = NODES.get(layer, layer) if is_resnet else layer
        if node not in graph and not any(other.startswith(f"{node}.") for other in graph):
            others = {"pooled": is_resnet, "flatten (pooled)": "flatten" in graph}
            pooled = next((f", {other}" for other, exists in others.items() if exists), "")
            raise ValueError(
                f"backbone.layers: {name} has no {layer}; {describe_layers(name, layer)}{pooled}"
            )
        nodes[node] = layer
    return nodes
