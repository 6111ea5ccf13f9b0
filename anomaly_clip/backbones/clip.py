"""CLIP as a frozen feature extractor: an open_clip model that includes pixel normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.blocks import PlainBlock
from anomaly_clip.backbones.clip_towers import ImageTower, OpenCLIPTower, image_tower
from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.backbones.tokenizers import PromptTokenizer, tokenizer_of
from anomaly_clip.errors import check_choice
from anomaly_clip.progress import say
from anomaly_clip.records import DEMO, RANDOM, WeightsRecord

__all__ = ["CLIPBackbone", "CLIPSettings", "Tokens", "Window", "from_checkpoint", "unit"]

DEFAULT_NAME = "ViT-B-16-plus-240"
QUICK_GELU = ("auto", "true", "false")
POSITIONS = ("bicubic_antialias", "bicubic", "bilinear")


@dataclass(frozen=True)
class CLIPSettings:
    """Choice of CLIP model, as plain values that configurations and checkpoints can store.

    Args:
        name: An open_clip model name, or the path of a JSON model configuration; which image towers
            are supported: docs/weights.md.
        pretrained: An open_clip tag (downloaded on first use), a file or folder with weights (see
            docs/weights.md), demo (the small CLIP that comes with the project, trained on generated
            images only; the default name then becomes demo), or the word random (untrained weights
            to test a pipeline; the metrics mean nothing).
        image_size: Side of the input in pixels; null uses the model's default.
        quick_gelu: Activation. auto: that of the weights, as far as their tag or a file next to
            them states it, else that of the model name; true: QuickGELU; false: GELU, also for
            weights trained with QuickGELU (OpenAI's), as in published runs of MuSc and APRIL-GAN.
        positions: Interpolation of positional embeddings to another image size:
            bicubic_antialias (open_clip, APRIL-GAN, image towers of timm), bicubic (MuSc) or
            bilinear (AnomalyCLIP).
    """

    name: str = DEFAULT_NAME
    pretrained: str = "laion400m_e31"
    image_size: int | None = None
    quick_gelu: Literal["auto", "true", "false"] | bool = "auto"
    positions: Literal["bicubic_antialias", "bicubic", "bilinear"] = "bicubic_antialias"

    def __post_init__(self) -> None:
        if isinstance(self.quick_gelu, bool):  # as YAML reads true and false
            object.__setattr__(self, "quick_gelu", "true" if self.quick_gelu else "false")
        check_choice("backbone.quick_gelu", str(self.quick_gelu), QUICK_GELU)
        check_choice("backbone.positions", self.positions, POSITIONS)


class Tokens(NamedTuple):
    """The tokens of one layer."""

    raw: Tensor
    """``(B, P + N, W)``, as the layer returns them: the ``P`` prefix tokens of the tower (CLIP: the
    class token, SigLIP: none) and the patches; ``W`` is the width of the image tower."""
    projected: Tensor
    """``(B, 1 + N, D)`` in the text embedding space, not normalised: the image embedding (CLIP:
    that of the class token) and the patches, each as the head sees it alone; see
    :mod:`.clip_towers`."""


class Window(NamedTuple):
    """A square part of the patch grid."""

    top: int
    left: int
    side: int


class CLIPBackbone(FrozenBackbone):
    """An open_clip model, frozen and in evaluation mode.

    Args:
        name: An open_clip model name, or the path of a JSON model configuration.
        pretrained: An open_clip tag, a weights file, ``demo`` or ``random``.
        image_size: Side of the input in pixels; None uses the model's default.
        mean: Pixel mean; None uses the value that the weights were trained with.
        std: Pixel standard deviation; None uses the value that the weights were trained with.
        quick_gelu: Activation; see :class:`CLIPSettings`.
        positions: Interpolation of positional embeddings; see :class:`CLIPSettings`.

    Raises:
        FileNotFoundError: If the weights are neither stored locally nor downloadable.
        ValueError: If the model is unknown, or the weights do not fit it.
    """

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        pretrained: str = "laion400m_e31",
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        quick_gelu: Literal["auto", "true", "false"] | bool = "auto",
        positions: Literal["bicubic_antialias", "bicubic", "bilinear"] = "bicubic_antialias",
    ) -> None:
        from anomaly_clip.backbones.weights import load_clip  # slow to import, see there

        if pretrained == DEMO and name == DEFAULT_NAME:
            name = DEMO
        settings = CLIPSettings(name, pretrained, image_size, quick_gelu, positions)
        loaded = load_clip(name, pretrained, image_size, str(settings.quick_gelu), positions)
        super().__init__(mean or loaded.mean, std or loaded.std)
        self.settings = settings
        self._source, self._activation = loaded.source, loaded.activation
        self.model = loaded.model.requires_grad_(False).eval()
        self.eval()
        self._text_config = loaded.text_config

    @classmethod
    def of(cls, settings: CLIPBackbone | CLIPSettings | Mapping[str, Any]) -> CLIPBackbone:
        """Return a ready backbone as it is, or build one from its settings.

        A mapping without ``quick_gelu``, as in checkpoints of version 0.1.0, gives the activation
        of that version; see :func:`~anomaly_clip.backbones.weights.activation_by_name`.
        """
        if isinstance(settings, CLIPBackbone):
            return settings
        if isinstance(settings, CLIPSettings):
            return cls(**asdict(settings))
        from anomaly_clip.backbones.clip_models import check_clip_settings  # slow to import

        check_clip_settings(settings)
        return cls(**from_checkpoint(settings))

    @property
    def visual(self) -> Any:
        """The image tower: open_clip's ``VisionTransformer`` or ``TimmModel``."""
        return self.model.visual

    @property
    def image_tower(self) -> ImageTower:
        """The interface to the image tower."""
        return image_tower(self.visual)

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        height, width = self.visual.image_size
        assert height == width, "load_clip refuses others"
        return int(height)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.image_tower.patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_tower.grid_size

    @property
    def width(self) -> int:
        """Width of the image tower's tokens, ``W``."""
        return self.image_tower.width

    @property
    def embed_dim(self) -> int:
        """Dimension of the space that images and texts share, ``D``."""
        return self.image_tower.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches, ``P``: 1 for CLIP's class token."""
        return self.image_tower.num_prefix_tokens

    @property
    def pools_class_token(self) -> bool:
        """True if the image embedding is made from the class token alone."""
        return self.image_tower.pools_class_token

    @property
    def blocks(self) -> list[PlainBlock]:
        """The blocks of the image tower.

        Raises:
            ValueError: If they are not plain; see :mod:`.blocks`.
        """
        tower = self.image_tower
        if tower.reason_not_plain is not None:
            raise ValueError(
                f"backbone.name {self.settings.name}: value-value attention and isolated windows "
                f"need an image tower of plain transformer blocks, but this one has "
                f"{tower.reason_not_plain}; use method SDP with model.paths original, or a model "
                f"such as ViT-B-16-plus-240 or ViT-B-16-SigLIP2"
            )
        return tower.blocks()

    @property
    def channels(self) -> dict[Any, int]:
        """Number of channels per layer, the same for all."""
        return dict.fromkeys(range(1, self.num_layers + 1), self.width)

    @property
    def strides(self) -> dict[Any, int]:
        """Stride in pixels per layer: the side of a patch."""
        return dict.fromkeys(range(1, self.num_layers + 1), self.patch_size)

    @property
    def vocabulary(self) -> list[str]:
        """Whole words of the tokenizer that consist of ASCII letters."""
        return self.tokenizer.vocabulary

    @property
    def num_layers(self) -> int:
        """Number of blocks of the image tower."""
        return self.image_tower.num_layers

    @property
    def text_tower(self) -> Any:
        """The module with the layers of the text tower, which for open_clip's CLIP is the model."""
        return getattr(self.model, "text", self.model)

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the text tower; that of the model hub is loaded when it is needed."""
        return tokenizer_of(self.settings.name, self._text_config)

    @property
    def context_length(self) -> int:
        """Number of tokens of the text tower."""
        return int(self.model.context_length)

    @property
    def num_text_layers(self) -> int:
        """Number of blocks of the text tower."""
        return len(self.text_tower.transformer.resblocks)

    @property
    def _pools_causal_end(self) -> bool:
        """True if a text is embedded by its end token, which attends to no token after it."""
        text = self.text_tower
        pool = text.text_pool_type if text is self.model else text.pool_type
        return text.attn_mask is not None and pool == "argmax"

    def check_learnable_text(self, method: str) -> None:
        """Check that this is a CLIP as the methods with learnable prompts or weights expect it.

        Args:
            method: Name of the method, for the message.

        Raises:
            ValueError: If the image tower is not open_clip's, or the text tower is not causal.
        """
        if self.text_tower is self.model and isinstance(self.image_tower, OpenCLIPTower):
            return
        raise ValueError(
            f"backbone.name {self.settings.name}: {method} trains within CLIP's original "
            f"architecture (ViT with a class token, causal text tower), which this model does not "
            f"have; choose a model such as ViT-B-16-plus-240 or ViT-L-14-336, or the methods SDP, "
            f"WinCLIP, APRIL-GAN or MuSc"
        )

    @property
    def is_random(self) -> bool:
        """True if the weights are untrained and the metrics therefore mean nothing."""
        return self.settings.pretrained == RANDOM

    @property
    def label(self) -> tuple[str, str]:
        """Names of the architecture and of the weights' source."""
        return self.settings.name, self._source

    @property
    def weights(self) -> WeightsRecord:
        """Record of the weights, with activation and interpolation if they are not the defaults."""
        record = super().weights
        if self._activation is not None:
            record["activation"] = self._activation
        if self.settings.positions != POSITIONS[0]:
            record["positions"] = self.settings.positions
        return record

    @property
    def network(self) -> nn.Module:
        """The whole CLIP model: image tower and text tower."""
        return self.model

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        return self.visual

    def prepare(self, images: Tensor, side: int | None = None) -> Tensor:
        """Normalise uint8 images; floating-point images count as already normalised.

        Args:
            images: ``(B, 3, S, S)``.
            side: The expected ``S``; default: the image size of the model.

        Raises:
            ValueError: If the images are not ``(B, 3, S, S)``.
        """
        side = side or self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"CLIPBackbone {self.settings.name}: expected images (B, 3, {side}, {side}), got "
                f"{tuple(images.shape)}"
            )
        return self.normalise(images)

    def embed(self, images: Tensor, window: Window | None = None) -> Tensor:
        """Return the input of the first block ``(B, P + N, W)``.

        It is the sum of token embeddings and positional embeddings, after LN_pre.

        Args:
            images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
            window: Part of the patch grid whose positional embeddings are used, for images smaller
                than the model's image size; None for full-size images.
        """
        side = self.image_size if window is None else window.side * self.patch_size
        return self.image_tower.embed(self.prepare(images, side), window)

    def normed(self, tokens: Tensor) -> Tensor:
        """Return raw tokens ``(..., W)`` after the final norm (CLIP: LN_post)."""
        return self.image_tower.norm(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """Project raw tokens ``(..., W)`` into the text space ``(..., D)``, each alone."""
        return self.image_tower.project(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the image embedding ``(B, D)`` of the raw tokens ``(B, P + N, W)`` of a layer."""
        return self.image_tower.pool(tokens)

    def embeddings(self, tokens: Tensor, patches: Tensor | None = None) -> Tensor:
        """Return the image embedding and those of the patches ``(B, 1 + N, D)``.

        Args:
            tokens: Raw tokens ``(B, P + N, W)``.
            patches: Patches ``(B, N, W)`` in place of those among the tokens.
        """
        return self.image_tower.embeddings(tokens, patches)

    def encode_layers(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the raw tokens ``(B, P + N, W)`` of layers that exist; see :meth:`forward`."""

        def encode(images: Tensor) -> list[Tensor]:
            with self.out_of_autocast():
                return self.image_tower.layers(self.prepare(images), layers)

        return self.replayed(encode, ("layers", *layers), images)

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tokens]:
        """Return the tokens of the requested layers.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            layers: 1-based layer numbers, ascending; default: the last layer.

        Raises:
            ValueError: If a layer does not exist.
        """
        outputs = self.encode_layers(images, self.check_layers(layers))
        with self.out_of_autocast():
            return [Tokens(tokens, self.embeddings(tokens)) for tokens in outputs]

    def image_vectors(self, tokens: Tokens) -> Tensor:
        """Return the image embeddings ``(B, D)``, from the tokens of the last layer."""
        return tokens.projected[:, 0]

    def feature_maps(
        self, images: Tensor, layers: Sequence[int], *, norm: bool = False
    ) -> list[Tensor]:
        """Return the patches of the requested layers as feature maps ``(B, W, h, w)``.

        Args:
            images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
            layers: 1-based layer numbers, ascending.
            norm: Whether to apply the final norm (CLIP: LN_post).
        """
        first = self.num_prefix_tokens
        outputs = self.encode_layers(images, self.check_layers(layers))
        with self.out_of_autocast():
            patches = [self.normed(tokens) if norm else tokens for tokens in outputs]
            return [part[:, first:].mT.unflatten(2, self.grid_size) for part in patches]

    def check_layers(self, layers: Sequence[int] | None) -> list[int]:
        """Return 1-based layer numbers, the last layer by default.

        Raises:
            ValueError: If the numbers are not ascending, or the model has no such layer.
        """
        layers = [self.num_layers] if layers is None else list(layers)
        if not all(isinstance(layer, int) for layer in layers):
            raise ValueError(
                f"layers {layers}: the layers of {self.settings.name} are numbers from 1 to "
                f"{self.num_layers}; names are for CNNs"
            )
        ascending = all(a < b for a, b in pairwise(layers))
        if not layers or not ascending or layers[0] < 1 or layers[-1] > self.num_layers:
            raise ValueError(
                f"layers {layers}: expected ascending numbers between 1 and {self.num_layers}, the "
                f"number of blocks in {self.settings.name}"
            )
        return layers

    def is_cut(self, prompt: str) -> bool:
        """Return whether the text tower has too few tokens for a prompt, and loses its end."""
        return bool(self.lost_end(prompt))

    def lost_end(self, prompt: str) -> str:
        """Return the end of a prompt that the text tower has no tokens for; usually empty."""
        return self.tokenizer.lost_end(prompt)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids int64 ``(M, context length)``, padded; see ``is_cut``."""
        return self.tokenizer(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as ``(M, D)`` in float32, not normalised, in a single batch.

        With the causal mask of CLIP, token positions after the end of the longest prompt are left
        out. This is several times cheaper and gives the same result, because no token attends to
        later tokens. Other text towers (SigLIP, some MobileCLIP) get all positions.
        """
        ids = self.tokenize(prompts).to(self.mean.device)
        with self.out_of_autocast():
            if not self._pools_causal_end:
                return self.model.encode_text(ids).float()
            return self._encode_tokens(ids).float()

    def _encode_tokens(self, ids: Tensor) -> Tensor:
        last = ids.argmax(dim=-1)  # the end token has the highest id
        length = int(last.max()) + 1
        return self.encode_embedded(self.text_tower.token_embedding(ids[:, :length]), last)

    def encode_embedded(self, tokens: Tensor, last: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Run the text tower on embedded tokens; gradients flow back to the tokens.

        Args:
            tokens: ``(M, L, W)``, without positional embeddings; the start token first.
            last: int64 ``(M,)``, position of the end token of each prompt; the output at this
                position is the embedding.
            deep: Deep prompts ``(t, W)``: the first one replaces the ``t`` tokens after the start
                token before block 2, the next one before block 3, and so on.

        Returns:
            ``(M, D)``, not normalised.
        """
        model = self.text_tower
        length = tokens.shape[1]
        mask = model.attn_mask[:length, :length]
        tokens = tokens + model.positional_embedding[:length]
        if deep:
            for number, block in enumerate(model.transformer.resblocks):
                if 1 <= number <= len(deep):
                    inserted = deep[number - 1].expand(len(tokens), -1, -1)
                    rest = tokens[:, 1 + inserted.shape[1] :]
                    tokens = torch.cat([tokens[:, :1], inserted, rest], dim=1)
                tokens = block(tokens, attn_mask=mask)
        else:
            tokens = model.transformer(tokens, attn_mask=mask)
        tokens = model.ln_final(tokens)[torch.arange(len(last), device=last.device), last]
        if isinstance(model.text_projection, nn.Linear):
            return model.text_projection(tokens)
        return tokens if model.text_projection is None else tokens @ model.text_projection


def from_checkpoint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from a checkpoint, completed by the activation of version 0.1.0.

    Args:
        settings: Settings of a :class:`CLIPBackbone` as a mapping.
    """
    values = dict(settings)
    if "quick_gelu" not in values and "pretrained" in values:
        from anomaly_clip.backbones.weights import activation_by_name

        values["quick_gelu"] = activation_by_name(
            values.get("name", DEFAULT_NAME), values["pretrained"]
        )
        if values["quick_gelu"] != "auto":
            say(
                f"backbone.pretrained {values['pretrained']}: quick_gelu is "
                f"{values['quick_gelu']}, as in version 0.1.0, because the saved settings do not "
                f"contain it"
            )
    return values


def unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to unit length, in float32."""
    return F.normalize(vectors.float(), dim=-1)
