"""APRIL-GAN (arXiv 2305.17382): trained linear layers on CLIP, and a memory of normal patches.

One linear layer per stage projects the patches of CLIP's ordinary forward pass into the text space.
The layers are trained on the labelled test split of another data set (``data.auxiliary``); the CLIP
stays frozen. With a few normal reference images, the distance of each patch from the nearest patch
of the references is added. SDP+ of CLIP-AD descends from this method. No GAN is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.prompts import STATES_WINCLIP, PromptEnsemble, RVSSettings
from anomaly_clip.backbones.surgery import default_layers, encode_layers
from anomaly_clip.maps import image_score, patches_to_map
from anomaly_clip.methods.auxiliary_training import AuxiliaryTraining
from anomaly_clip.methods.linear_layers import (
    APRIL_GAN_KEY,
    initial_layers,
    load_linear_layers,
    segmentation_losses,
    stage_maps,
    write_linear_layers,
)
from anomaly_clip.methods.prompted_method import ReferenceMethod
from anomaly_clip.methods.sdp import text_score
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores, UseOfShots

__all__ = ["APRILGAN", "Memory"]

STATES_ABNORMAL = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
PROMPTS = PromptEnsemble(list(STATES_WINCLIP), list(STATES_ABNORMAL), "april_gan")
BETAS = (0.5, 0.999)  # of Adam

Memory = tuple[Tensor, ...]
"""Patches of the references of a category, ``(k * N, W)`` for each layer, unit rows."""


class APRILGAN(AuxiliaryTraining, ReferenceMethod[Memory]):
    """APRIL-GAN, zero-shot or with ``data.shots`` reference images (docs/methods/april_gan.md).

    Args:
        backbone: The CLIP model. The configurations have the published one, ViT-L-14-336
            of OpenAI with GELU at 518 pixels.
        prompts: States and templates of the normal and the abnormal prompts.
        layers: Layers with a trained linear layer, 1-based; default: the last one of each quarter
            of the tower (published: 6, 12, 18, 24).
        memory_layers: Layers whose patches are compared with those of the references; default: as
            ``layers``.
        lr: Learning rate of Adam.
        linear_layers: File of trained layers, with which no fit is needed. In the authors' format,
            its key ``trainable_linearlayer`` holds a dictionary of ``fc.{i}.weight`` and
            ``fc.{i}.bias``; other forms: docs/weights.md.
        feature_cache_gb: Maximum size of the cache of frozen image features, in GB (1e9 bytes). The
            cache is filled at the start of ``fit``. 0 turns it off: images are then decoded and
            encoded in every epoch.
        evaluator: Settings of the metrics.
    """

    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "memory_layers", "feature_cache_gb", "linear_layers"}
    )
    init_only_arguments: ClassVar[frozenset[str]] = frozenset({"linear_layers"})
    use_of_shots: ClassVar[UseOfShots] = "references"
    scaled_parts: ClassVar[tuple[bool, ...]] = (False, True)

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        prompts: PromptEnsemble = PROMPTS,
        layers: list[int] | None = None,
        memory_layers: list[int] | None = None,
        lr: float = 1e-3,
        linear_layers: str | None = None,
        feature_cache_gb: float = 20.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(prompts, RVSSettings("mean"), evaluator)
        self.backbone = CLIPBackbone.of(backbone)
        self.set_training(lr, feature_cache_gb)
        tower = self.backbone
        self.layers = tower.check_layers(
            default_layers(tower.num_layers) if layers is None else layers
        )
        self.memory_layers = tower.check_layers(
            self.layers if memory_layers is None else memory_layers
        )
        self.fc = initial_layers(tower, len(self.layers))
        saved = {"backbone": asdict(tower.settings), "prompts": asdict(self.prompts)}
        self.save_hyperparameters(ignore=[*saved, "evaluator", "linear_layers"])
        self.save_hyperparameters(saved)
        if linear_layers is not None:
            name = f"{tower.settings.name} with layers {self.layers}"
            self._external = load_linear_layers(self.fc, linear_layers, name, APRIL_GAN_KEY)
            self.fitted = True

    @property
    def score_part_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the parts of a score: none without references."""
        return ("text", "map") if self.has_references else ()

    # -- scoring ---------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, images: Tensor, *, scoring: bool) -> dict[str, Tensor]:
        """Return the patches of the layers, and for scoring the image vector; see the base class.

        Returns:
            ``raw.{layer}`` ``(B, N, W)``, not projected; for scoring also those of
            ``memory_layers``, and ``image`` ``(B, D)``.
        """
        tower = self.backbone
        numbers = {*self.layers, *self.memory_layers, tower.num_layers} if scoring else self.layers
        layers = sorted(numbers)
        needed = {*self.layers, *(self.memory_layers if scoring else ())}
        encoded = dict(zip(layers, encode_layers(tower, images, layers), strict=True))
        first = tower.num_prefix_tokens
        tokens = {f"raw.{layer}": encoded[layer][:, first:] for layer in layers if layer in needed}
        if scoring:
            with tower.out_of_autocast():
                tokens["image"] = tower.pool(encoded[tower.num_layers])
        return tokens

    def score_tokens(self, tokens: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens of images of given categories; see the base class."""
        memory = [self._memory[name] for name in categories] if self._memory else None
        return self._score_against(tokens, self.texts(categories), memory)

    @torch.no_grad()
    def score_with_text(
        self, images: Tensor, text: Tensor, memory: Sequence[Memory] | None = None
    ) -> Scores:
        """Score images against text features and references; see the base class.

        Returns:
            The map, in 0 to the number of layers, plus the distances, without blur. The image score
            is that of the text; with references, the maximum of the map is the second part.
        """
        return self._score_against(self.tokens(images, scoring=True), text, memory)

    def _score_against(
        self, tokens: dict[str, Tensor], text: Tensor, memory: Sequence[Memory] | None
    ) -> Scores:
        size = (self.image_size, self.image_size)
        with self.backbone.out_of_autocast():
            raw = [tokens[f"raw.{layer}"] for layer in self.layers]
            maps = stage_maps(self.fc, raw, text, size).sum(dim=0)
            r0 = text_score(tokens["image"], text)
            if memory is None:
                return Scores(image_score=r0, anomaly_map=maps)
            for number, layer in enumerate(self.memory_layers):
                rows = [of_category[number] for of_category in memory]
                distance = distances(tokens[f"raw.{layer}"], rows)
                maps = maps + patches_to_map(distance, size, align_corners=True)
            parts = torch.stack([r0, image_score(maps, "max")], dim=1)
        return Scores(image_score=r0, anomaly_map=maps, score_parts=parts)

    @torch.no_grad()
    def remember(self, images: Tensor) -> Memory:
        """Return the patches of the reference images ``(k, 3, H, W)`` of a category."""
        encoded = encode_layers(self.backbone, images, self.memory_layers)
        first = self.backbone.num_prefix_tokens
        return tuple(unit(tokens[:, first:].flatten(0, 1)) for tokens in encoded)

    # -- training --------------------------------------------------------------------------------

    def token_options(self, scoring: bool) -> str:
        """Return the options that the tokens depend on."""
        return f"{self.layers} {self.memory_layers if scoring else ''}"

    def losses(self, tokens: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the focal and dice losses, summed over the layers."""
        mask = batch["mask"]
        raw = [tokens[f"raw.{layer}"] for layer in self.layers]
        text = self.texts(batch["category"])
        maps = stage_maps(self.fc, raw, text, (mask.shape[-2], mask.shape[-1]))
        return segmentation_losses(maps, mask)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam without a schedule, as published."""
        return torch.optim.Adam(self.fc.parameters(), lr=self.lr, betas=BETAS)

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return "linear_layers.pth"

    def export(self, folder: Path) -> Path:
        """Write the layers in the authors' format."""
        file = folder / self.export_name
        write_linear_layers(self.fc, file, APRIL_GAN_KEY)
        return file


def distances(patches: Tensor, memory: Sequence[Tensor]) -> Tensor:
    """Return the cosine distance ``(B, N)`` of each patch from the nearest one in memory.

    Args:
        patches: ``(B, N, W)``, of any norm.
        memory: Unit rows ``(m, W)`` of each image, or a single element for all images.
    """
    if len(memory) == 1:
        return 1 - (unit(patches) @ memory[0].mT).amax(dim=-1)
    pairs = zip(patches, memory, strict=True)
    # One image at a time, as the pairs of a whole batch would take too much memory.
    return torch.stack([1 - (unit(rows) @ near.mT).amax(dim=-1) for rows, near in pairs])
