"""Convolutional backbones from torchvision, frozen, for the detectors that judge a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.errors import reason, suggest
from anomaly_clip.records import RANDOM

__all__ = ["IMAGENET", "CNNBackbone", "CNNSettings", "load_network", "read_state"]

IMAGENET = "imagenet"
"""The one word that asks for torchvision's ImageNet weights."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("layer1", "layer2", "layer3", "layer4")
NODES = {**{stage: stage for stage in STAGES}, "pooled": "flatten"}
"""What layers of a ResNet are called here, and in torchvision's graph."""

HEADS = ("fc.", "classifier.", "head.")
"""Parts of a file that classify: no feature depends on them."""
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "backbone")
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "network.", "visual.", "resnet.")
PROBE = 256  # pixels, for the shapes of features


@dataclass(frozen=True)
class CNNSettings:
    """Which CNN: plain values, so that a configuration and a checkpoint can hold them.

    Args:
        name: A torchvision model.
        weights: imagenet (downloaded on first use: IMAGENET1K_V1, as in the papers); a file, of a
            TAB export, of torchvision or timm, bare or under state_dict or model; or the word
            random (untrained: its figures mean nothing).
        layers: Which features are handed out: of ResNets layer1 to layer4 and pooled, of any model
            the nodes of torchvision's graph, such as features.7.cat; null takes all five of a
            ResNet.
        mean: Pixel mean.
        std: Pixel standard deviation.
    """

    name: str = "resnet18"
    weights: str = IMAGENET
    layers: list[str] | None = None
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))


class CNNBackbone(FrozenBackbone):
    """A torchvision model that hands out the features of some layers, frozen.

    Of a ResNet, a stage's features are those of its last block, after the ReLU; ``pooled`` are the
    averages of the last.

    Args:
        name: As for :class:`CNNSettings`, and so the others.
        weights: Where weights come from.
        layers: Which features.
        mean: Pixel mean.
        std: Pixel standard deviation.

    Raises:
        FileNotFoundError: If weights are neither at hand nor to be had.
        ValueError: If the model, a layer or the weights are unknown or do not fit.
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
        shapes = self._probe()
        self.channels = {layer: shape[1] for layer, shape in shapes.items()}
        """Channels of each layer."""
        self.strides = {
            layer: 2 ** round(math.log2(PROBE / shape[-1]))
            for layer, shape in shapes.items()
            if len(shape) == 4
        }
        """Pixels between two positions of each layer that has positions."""

    def _probe(self) -> dict[str, torch.Size]:
        """Return the shape of each layer's features of one image.

        Raises:
            ValueError: If they are not those of a convolutional network.
        """
        name = self.settings.name
        try:
            with torch.no_grad():
                shapes = {k: v.shape for k, v in self(torch.zeros(1, 3, PROBE, PROBE)).items()}
        except (AssertionError, RuntimeError) as error:  # a transformer of another image size
            raise ValueError(
                f"backbone.name {name} takes no images of {PROBE} pixels ({reason(error)}): take a "
                f"convolutional network"
            ) from None
        for layer, shape in shapes.items():
            square = len(shape) == 4 and shape[2] == shape[3]
            if not (square or len(shape) == 2):  # tokens, or channels at the end
                raise ValueError(
                    f"backbone.layers: {layer} of {name} has the shape {tuple(shape)}, not (B, C, "
                    f"h, w): take a convolutional network"
                )
        return shapes

    @classmethod
    def of(cls, settings: CNNBackbone | CNNSettings | Mapping[str, Any]) -> CNNBackbone:
        """Return a ready backbone as it is, or build one from its settings."""
        if isinstance(settings, CNNBackbone):
            return settings
        values = asdict(settings) if isinstance(settings, CNNSettings) else dict(settings)
        return cls(**values)

    @property
    def label(self) -> tuple[str, str]:
        """The architecture's name, and where the weights come from."""
        return self.settings.name, self.settings.weights

    @property
    def is_random(self) -> bool:
        """Whether the weights are untrained, so that figures mean nothing."""
        return self.settings.weights == RANDOM

    @property
    def network(self) -> nn.Module:
        """The layers up to the last that is handed out."""
        return self.features

    @property
    def tower(self) -> nn.Module:
        """The same."""
        return self.features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each layer, ``(B, C, h, w)``, or ``(B, C)`` if they are pooled.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating and normalised already.

        Raises:
            ValueError: If the images are not ``(B, 3, H, W)``.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"CNNBackbone {self.settings.name}: expected images (B, 3, H, W), got "
                f"{tuple(images.shape)}"
            )
        with self.out_of_autocast():
            return self.features(self.normalise(images))


def load_network(name: str, weights: str) -> nn.Module:
    """Return a torchvision model, its classifier included.

    Args:
        name: Of the model.
        weights: As for :class:`CNNSettings`.

    Raises:
        FileNotFoundError: If weights are neither at hand nor to be had.
        ValueError: If the model or the weights are unknown or do not fit.
    """
    model = _build(name)
    if weights in (None, "", "None", "null"):
        raise ValueError(
            f"backbone.weights of {name} is empty: give '{IMAGENET}', a weights file, or the word "
            f"'{RANDOM}' for untrained weights"
        )
    if weights == IMAGENET:
        _fill(model, _imagenet_state(name), f"backbone.weights {IMAGENET}", name)
    elif weights != RANDOM:
        _fill(model, read_state(weights), f"backbone.weights {weights}", name)
    if weights != RANDOM and hasattr(model, "transform_input"):
        # GoogLeNet's weights, and Inception's, want other pixels.
        model.transform_input = True  # type: ignore[assignment]
    return model


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Read a state dict, bare or inside one of the known containers; known prefixes are cut off.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or could run code.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"backbone.weights {file}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch have many kinds
        raise ValueError(
            f"backbone.weights {file}: not weights that can be read safely ({reason(error)})"
        ) from None
    while isinstance(content, dict):
        inner = [content[key] for key in CONTAINERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ValueError(f"backbone.weights {file}: there are no weights in it")
    while True:
        common = [p for p in PREFIXES if all(key.startswith(p) for key in tensors)]
        if not common:
            return tensors
        tensors = {key.removeprefix(common[0]): value for key, value in tensors.items()}


def _build(name: str) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        hint = suggest(name, names) or "take a ResNet, as resnet18"
        raise ValueError(f"backbone.name {name}: torchvision has no such model: {hint}")
    # Untrained weights follow the run's seed alone, and leave later draws as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        model: nn.Module = models.get_model(name, weights=None)
    return model


def _imagenet_state(name: str) -> dict[str, Tensor]:
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
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except RuntimeError as error:  # its hash is another
        raise ValueError(
            f"backbone.weights {IMAGENET}: {file.name} came broken ({reason(error)}): try again, "
            f"or name a weights file (--model.backbone.weights FILE)"
        ) from None
    except OSError as error:
        raise FileNotFoundError(
            f"backbone.weights {IMAGENET}: {file.name} is not in {folder} and cannot be downloaded "
            f"({reason(error)}); copy it from a machine with network, name a weights file "
            f"(--model.backbone.weights FILE), or try the pipeline with '{RANDOM}'"
        ) from None
    return state


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Load a state dict; all but the classifier must fit."""
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS)}
    given = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    counters = [key for key in expected if key.endswith("num_batches_tracked")]
    missing = [key for key in expected if key not in given and key not in counters]
    unexpected = [key for key in given if key not in expected]
    shapes = [key for key in expected if key in given and expected[key].shape != given[key].shape]
    for what, keys in (
        ("lacks", missing),
        ("does not know", unexpected),
        ("has another shape of", shapes),
    ):
        if keys:
            who = f"{source}" if what != "does not know" else f"{source}: {name}"
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{who} {what} {keys[0]}{more}: is it of another model than {name}?")
    model.load_state_dict({k: v for k, v in given.items() if k in expected}, strict=False)


def _nodes(model: nn.Module, name: str, layers: Sequence[str] | None) -> dict[str, str]:
    """Return which nodes of the graph are handed out, and under which names."""
    from torchvision.models.feature_extraction import get_graph_node_names

    is_resnet = all(hasattr(model, stage) for stage in STAGES)
    if layers is not None and not layers:
        raise ValueError(f"backbone.layers of {name} is empty: name one or more")
    if layers is None:
        if not is_resnet:
            raise ValueError(f"backbone.layers of {name}: say which, as [features.7.cat]")
        return {node: layer for layer, node in NODES.items()}
    graph = get_graph_node_names(model)[1]
    nodes = {}
    for layer in layers:
        node = NODES.get(layer, layer) if is_resnet else layer
        if node not in graph and not any(other.startswith(f"{node}.") for other in graph):
            stages = ", ".join(NODES) if is_resnet else ", ".join(graph[-4:])
            raise ValueError(f"backbone.layers: {name} has no {layer} (there are {stages}, ...)")
        nodes[node] = layer
    return nodes
