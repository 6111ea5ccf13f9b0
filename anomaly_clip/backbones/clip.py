"""CLIP as a frozen feature extractor: an open_clip model that includes pixel normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.frozen import FrozenBackbone, check_settings
from anomaly_clip.errors import check_choice
from anomaly_clip.progress import say
from anomaly_clip.records import DEMO, RANDOM, WeightsRecord

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

__all__ = ["CLIPBackbone", "CLIPSettings", "Tokens", "Window", "from_checkpoint", "unit"]

DEFAULT_NAME = "ViT-B-16-plus-240"
QUICK_GELU = ("auto", "true", "false")
POSITIONS = ("bicubic_antialias", "bicubic", "bilinear")


@dataclass(frozen=True)
class CLIPSettings:
    """Choice of CLIP model, as plain values that configurations and checkpoints can store.

    Args:
        name: An open_clip model name, or the path of a JSON model configuration.
        pretrained: An open_clip tag (downloaded on first use), a file or folder with weights (see
            docs/weights.md), demo (the small CLIP that comes with the project, trained on generated
            images only; the default name then becomes demo), or the word random (untrained weights
            to test a pipeline; the metrics mean nothing).
        image_size: Side of the input in pixels; null uses the model's default.
        quick_gelu: Activation. auto: that of the weights, as far as their tag or a file next to
            them states it, else that of the model name; true: QuickGELU; false: GELU, also for
            weights trained with QuickGELU (OpenAI's), as in published runs of MuSc and APRIL-GAN.
        positions: Interpolation of positional embeddings to another image size:
            bicubic_antialias (open_clip, APRIL-GAN), bicubic (MuSc) or bilinear (AnomalyCLIP).
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
    """The tokens of one layer, class token first."""

    raw: Tensor
    """``(B, 1 + N, W)``, as the layer returns them; ``W`` is the width of the image tower."""
    projected: Tensor
    """``(B, 1 + N, D)`` in the text embedding space, not normalised."""


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
        from open_clip import SimpleTokenizer  # slow to import, see weights.py

        from anomaly_clip.backbones.weights import load_clip

        if pretrained == DEMO and name == DEFAULT_NAME:
            name = DEMO
        settings = CLIPSettings(name, pretrained, image_size, quick_gelu, positions)
        loaded = load_clip(name, pretrained, image_size, str(settings.quick_gelu), positions)
        super().__init__(mean or loaded.mean, std or loaded.std)
        self.settings = settings
        self._source, self._activation = loaded.source, loaded.activation
        self.model = loaded.model.requires_grad_(False).eval()
        self.eval()
        self._tokenize = SimpleTokenizer(context_length=self.model.context_length)

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
        check_settings(settings, "pretrained")
        return cls(**from_checkpoint(settings))

    @property
    def visual(self) -> VisionTransformer:
        """The image tower."""
        return self.model.visual

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        height, width = self.visual.image_size
        assert height == width, "open_clip's plain ViTs are square"
        return int(height)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        height, width = self.visual.patch_size
        assert height == width, "open_clip's plain ViTs are square"
        return int(height)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the grid of patches."""
        rows, columns = self.visual.grid_size
        return int(rows), int(columns)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token."""
        return 1

    @property
    def channels(self) -> dict[Any, int]:
        """Number of channels per layer, the same for all."""
        width = int(self.visual.conv1.out_channels)
        return dict.fromkeys(range(1, self.num_layers + 1), width)

    @property
    def strides(self) -> dict[Any, int]:
        """Stride in pixels per layer: the side of a patch."""
        return dict.fromkeys(range(1, self.num_layers + 1), self.patch_size)

    @property
    def vocabulary(self) -> list[str]:
        """Whole words of the tokenizer that consist of ASCII letters."""
        ends = (
            word.removesuffix("</w>") for word in self._tokenize.encoder if word.endswith("</w>")
        )
        return sorted(word for word in ends if len(word) > 1 and word.isascii() and word.isalpha())

    @property
    def num_layers(self) -> int:
        """Number of blocks of the image tower."""
        return len(self.visual.transformer.resblocks)

    @property
    def num_text_layers(self) -> int:
        """Number of blocks of the text tower."""
        return len(self.model.transformer.resblocks)

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
        """Return the input of the first block ``(B, 1 + N, W)``.

        It is the sum of token embeddings and positional embeddings, after LN_pre.

        Args:
            images: uint8 ``(B, 3, S, S)``, or floating point and already normalised.
            window: Part of the patch grid whose positional embeddings are used, for images smaller
                than the model's image size; None for full-size images.
        """
        visual = self.visual
        side = self.image_size if window is None else window.side * visual.patch_size[0]
        patches = visual.conv1(self.prepare(images, side)).flatten(2).mT  # (B, N, W)
        first = visual.class_embedding.expand(len(patches), 1, -1)  # (B, 1, W)
        tokens = torch.cat([first, patches], dim=1) + self._positions(window)
        return visual.ln_pre(tokens)

    def _positions(self, window: Window | None) -> Tensor:
        """Return the positional embeddings ``(1 + N, W)`` of the class token and of a window."""
        positions = self.visual.positional_embedding
        if window is None:
            return positions
        rows, columns = (slice(start, start + window.side) for start in window[:2])
        grid = positions[1:].unflatten(0, self.visual.grid_size)[rows, columns]  # (h, w, W)
        return torch.cat([positions[:1], grid.flatten(0, 1)])  # (1 + h * w, W)

    def project(self, tokens: Tensor) -> Tensor:
        """Project raw tokens ``(..., W)`` into the text space ``(..., D)``, after LN_post."""
        return self.visual.ln_post(tokens) @ self.visual.proj

    def forward(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tokens]:
        """Return the tokens of the requested layers, class token first.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            layers: 1-based layer numbers, ascending; default: the last layer.

        Raises:
            ValueError: If a layer does not exist.
        """
        layers = self.check_layers(layers)
        outputs = []
        with self.out_of_autocast():
            tokens = self.embed(images)
            for number, block in enumerate(
                self.visual.transformer.resblocks[: layers[-1]], start=1
            ):
                tokens = block(tokens)
                if number in layers:
                    outputs.append(Tokens(tokens, self.project(tokens)))
        return outputs

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
            norm: Whether to apply the final norm, LN_post.
        """
        with self.out_of_autocast():
            patches = [tokens.raw[:, self.num_prefix_tokens :] for tokens in self(images, layers)]
            normed = [self.visual.ln_post(part) if norm else part for part in patches]
            return [part.mT.unflatten(2, self.grid_size) for part in normed]

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
        limit = self.model.context_length - 2  # without start and end token
        # No token is shorter than a byte, so most prompts need not be counted.
        if len(prompt.encode("utf-8", "replace")) <= limit:  # names of files need not be UTF-8
            return ""
        return str(self._tokenize.decode(self._tokenize.encode(prompt)[limit:])).strip()

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids int64 ``(M, context length)``, padded with zeros; see ``is_cut``."""
        return self._tokenize(list(prompts))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as ``(M, D)`` in float32, not normalised, in a single batch.

        Token positions after the end of the longest prompt are left out. This is several times
        cheaper and gives the same result, because under the causal mask no token attends to later
        tokens.
        """
        ids = self.tokenize(prompts).to(self.mean.device)
        with self.out_of_autocast():
            return self._encode_tokens(ids).float()

    def _encode_tokens(self, ids: Tensor) -> Tensor:
        last = ids.argmax(dim=-1)  # the end token has the highest id
        length = int(last.max()) + 1
        return self.encode_embedded(self.model.token_embedding(ids[:, :length]), last)

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
        model = self.model
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
