"""Frozen vision transformers from timm, such as DINOv2 and DINOv3: image towers without texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anomaly_clip.backbones.clip import Tokens
from anomaly_clip.backbones.frozen import FrozenBackbone, check_settings
from anomaly_clip.records import RANDOM, WeightsRecord

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["AUTO", "ViTBackbone", "ViTSettings", "is_vit", "vit_names"]

MODULES = ("vision_transformer", "vision_transformer_hybrid", "eva", "beit", "deit")
"""Modules of timm with most of the ViTs that are supported."""
AUTO = "auto"
"""Value of ``weights`` that selects the published weights of a model."""


@dataclass(frozen=True)
class ViTSettings:
    """Choice of vision transformer, as plain values that checkpoints can store.

    Args:
        name: A timm ViT, such as vit_small_patch14_dinov2; it may end with a tag of its weights
            (vit_small_patch14_dinov2.lvd142m).
        weights: auto (the tag in the name, or else timm's default), a tag, a weights file, or the
            word random (untrained: the metrics mean nothing).
        mean: Pixel mean; null uses that of the weights.
        std: Pixel standard deviation; null uses that of the weights.
    """

    name: str = "vit_small_patch14_dinov2"
    weights: str = AUTO
    mean: list[float] | None = None
    std: list[float] | None = None


class ViTBackbone(FrozenBackbone):
    """A frozen timm ViT: with or without class token, registers, LayerScale or rotary positions.

    Args:
        name: A timm ViT; the arguments with this name in :class:`ViTSettings` are the same.
        weights: Source of the weights.
        image_size: Side, or height and width, of the input in pixels, to which positional
            embeddings are interpolated (bicubic, antialiased); None uses the size that the weights
            were trained with.
        mean: Pixel mean.
        std: Pixel standard deviation.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If timm has no such ViT, or the weights do not fit it.
    """

    def __init__(
        self,
        name: str = "vit_small_patch14_dinov2",
        weights: str = AUTO,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        from anomaly_clip.backbones.vit_weights import load_vit  # timm is slow to import

        loaded = load_vit(name, weights, image_size)
        super().__init__(mean or loaded.mean, std or loaded.std)
        self.settings = ViTSettings(
            loaded.name,
            loaded.weights,
            None if mean is None else list(mean),
            None if std is None else list(std),
        )
        self.model: VisionTransformer = loaded.model.requires_grad_(False).eval()
        self.eval()
        self.channels: dict[Any, int] = dict.fromkeys(
            range(1, self.num_layers + 1), int(self.model.embed_dim)
        )
        """Number of channels per layer, the same for all."""
        self.strides: dict[Any, int] = dict.fromkeys(
            self.channels, self.image_size // self.grid_size[0]
        )
        """Stride in pixels per layer: the side of a patch."""

    @classmethod
    def of(
        cls, settings: ViTBackbone | ViTSettings | Mapping[str, Any], image_size: int | None = None
    ) -> ViTBackbone:
        """Return a ready backbone as it is, or build one from its settings."""
        if isinstance(settings, ViTBackbone):
            return settings
        if not isinstance(settings, ViTSettings):
            check_settings(settings, "name")
            settings = ViTSettings(**settings)
        return cls(**asdict(settings), image_size=image_size)

    @property
    def label(self) -> tuple[str, str]:
        """Names of the architecture and of the weights' source."""
        return self.settings.name, self.settings.weights

    @property
    def is_random(self) -> bool:
        """True if the weights are untrained and the metrics therefore mean nothing."""
        return self.settings.weights == RANDOM

    @property
    def weights(self) -> WeightsRecord:
        """Record of the weights, and of the kind of backbone."""
        record = super().weights
        record["kind"] = "ViT"
        return record

    @property
    def network(self) -> nn.Module:
        """The model."""
        return self.model

    @property
    def tower(self) -> nn.Module:
        """The same module as :attr:`network`."""
        return self.model

    @property
    def image_size(self) -> int:
        """Side of the input in pixels; its height if it is not square."""
        return int(self.model.patch_embed.img_size[0])

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the grid of patches."""
        rows, columns = self.model.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: class token, if there is one, and registers."""
        return int(self.model.num_prefix_tokens)

    def check_layers(self, layers: Sequence[int] | Sequence[str] | None) -> list[int]:
        """Return 1-based numbers of blocks, the last one by default.

        Raises:
            ValueError: If the numbers are not ascending, or the model has no such block.
        """
        given: list[Any] = [self.num_layers] if layers is None else list(layers)
        numbers = [int(layer) if str(layer).isdecimal() else 0 for layer in given]
        ascending = all(a < b for a, b in pairwise(numbers))
        if not numbers or not ascending or numbers[0] < 1 or numbers[-1] > self.num_layers:
            raise ValueError(
                f"model.layers {given}: the layers of {self.settings.name} are its blocks, "
                f"ascending numbers from 1 to {self.num_layers}"
            )
        return numbers

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tokens]:
        """Return the tokens of the requested layers: class token, registers, patches.

        ``projected`` are the tokens after the final norm, as there is no text space.

        Args:
            images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
            layers: 1-based numbers of blocks, ascending; default: the last one.

        Raises:
            ValueError: If a layer does not exist, or images do not have the image size.
        """
        with self.out_of_autocast():
            return [Tokens(raw, self.norm(raw)) for raw in self._run(images, layers)]

    def _run(self, images: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """Return the tokens ``(B, P + N, W)`` after each requested block."""
        indices = [number - 1 for number in self.check_layers(layers)]
        height, width = self.model.patch_embed.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(
                f"ViTBackbone {self.settings.name}: expected images (B, 3, {height}, {width}), got "
                f"{tuple(images.shape)}"
            )

        def run(images: Tensor) -> list[Tensor]:
            outputs: Any = self.model.forward_intermediates(
                self.normalise(images),
                indices=indices,
                return_prefix_tokens=self.num_prefix_tokens > 0,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            if self.num_prefix_tokens == 0:
                return list(outputs)
            return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

        return self.replayed(run, tuple(indices), images)

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm; of a model that only has one after its average pooling, that."""
        model = self.model
        after_pool = isinstance(model.norm, nn.Identity) and hasattr(model, "fc_norm")
        normed: Tensor = (model.fc_norm if after_pool else model.norm)(tokens)
        return normed

    def image_vectors(self, tokens: Tokens) -> Tensor:
        """Return one vector per image, ``(B, W)``, from the tokens of the last layer.

        It is the class token after the final norm, or the mean of the patches without one.
        """
        if self.model.cls_token is not None:
            return tokens.projected[:, 0]
        return tokens.projected[:, self.num_prefix_tokens :].mean(dim=1)

    def feature_maps(
        self, images: Tensor, layers: Sequence[int], *, norm: bool = False
    ) -> list[Tensor]:
        """Return the patches of the requested layers as feature maps ``(B, W, h, w)``.

        Args:
            images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
            layers: 1-based numbers of blocks, ascending.
            norm: Whether to apply the final norm.
        """
        with self.out_of_autocast():
            tokens = self._run(images, layers)
            patches = [raw[:, self.num_prefix_tokens :] for raw in tokens]  # (B, N, W)
            normed = [self.norm(part) if norm else part for part in patches]
            return [part.mT.unflatten(2, self.grid_size) for part in normed]


def vit_names() -> list[str]:
    """Return the names of timm's models with a single grid of patches, for suggestions."""
    import timm

    return [name for module in MODULES for name in timm.list_models(module=module)]


def is_vit(name: str) -> bool:
    """Return whether a name is one of timm's, with or without the tag of its weights."""
    import timm

    return bool(timm.is_model(name.partition(".")[0]))
