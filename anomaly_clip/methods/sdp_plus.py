"""SDP+ of CLIP-AD (arXiv 2311.00453): trained linear layers align patches with the prompts.

One linear layer per stage projects the patch tokens of the original path into the text space, where
they are compared with the text vectors. The resulting probabilities are added to the map of SDP.
The layers are trained on the labelled test split of another data set (``data.auxiliary``); the CLIP
stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.backbones.surgery import StageTokens
from anomaly_clip.maps import gaussian_blur, image_score
from anomaly_clip.methods import sdp
from anomaly_clip.methods.auxiliary_training import AuxiliaryTraining
from anomaly_clip.methods.linear_layers import (
    LAYERS_KEY,
    initial_layers,
    load_linear_layers,
    segmentation_losses,
    stage_maps,
    write_linear_layers,
)
from anomaly_clip.methods.sdp import SDP, text_score
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["SDPPlus"]

SIGMA = {"VisA": 2.0}  # sigma of the Gaussian blur, in pixels at image size 240 (published)
DEFAULT_SIGMA = 8.0


class SDPPlus(AuxiliaryTraining, SDP):  # type: ignore[override]  # a property
    """SDP with trained linear layers (CLIP-AD, arXiv 2311.00453; docs/methods/sdp_plus.md).

    Args:
        backbone: The CLIP model.
        prompts: States and templates of the normal and the abnormal prompts.
        rvs: Reduction of the prompts of a class to one vector. A setting ``auto`` depends on the
            auxiliary data set during training and on the evaluated data set afterwards.
        stages: Stages in use, each given by the number of its last block (1-based); default: all
            four.
        stage_tokens: As for :class:`SDP`.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels; auto: 2 on VisA, 8
            elsewhere (published).
        lr: Learning rate of Adam.
        linear_layers: File of trained layers, with which no fit is needed. In the authors' format,
            its key ``linear_layers`` holds a dictionary of ``fc.{i}.weight`` and ``fc.{i}.bias``;
            other forms: docs/weights.md.
        feature_cache_gb: Maximum size of the cache of frozen image features, in GB (1e9 bytes). The
            cache is filled at the start of ``fit``. 0 turns it off: images are then decoded and
            encoded in every epoch.
        evaluator: Settings of the metrics.
    """

    reads_raw_patches: ClassVar[bool] = True
    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "feature_cache_gb", "linear_layers"}
    )
    init_only_arguments: ClassVar[frozenset[str]] = frozenset({"linear_layers"})
    token_code: ClassVar[tuple[ModuleType, ...]] = (sdp,)

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        prompts: PromptEnsemble = PromptEnsemble(),
        rvs: RVSSettings = RVSSettings(),
        stages: list[int] | None = None,
        stage_tokens: StageTokens = "official",
        sigma: float | Literal["auto"] = "auto",
        lr: float = 1e-4,
        linear_layers: str | None = None,
        feature_cache_gb: float = 20.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(
            backbone,
            prompts,
            rvs,
            stages,
            stage_tokens=stage_tokens,
            sigma=0.0 if sigma == "auto" else sigma,
            evaluator=evaluator,
        )
        self.set_training(lr, feature_cache_gb)
        self.requested_sigma = sigma
        self.fc = initial_layers(self.backbone, len(self.stages))
        self.save_hyperparameters(
            ignore=["backbone", "prompts", "rvs", "evaluator", "linear_layers"]
        )
        self.save_hyperparameters(
            {
                "backbone": asdict(self.backbone.settings),
                "prompts": asdict(self.prompts),
                "rvs": asdict(self.rvs),
            }
        )
        if linear_layers is not None:
            tower = f"{self.backbone.settings.name} with stages {self.stages}"
            self._external = load_linear_layers(self.fc, linear_layers, tower, LAYERS_KEY)
            self.fitted = True

    @property
    def blur(self) -> float:
        """Standard deviation of the Gaussian blur in use, in pixels."""
        if self.requested_sigma == "auto":
            return SIGMA.get(self.dataset_name or "", DEFAULT_SIGMA)
        return self.requested_sigma

    @torch.no_grad()
    def score_with_text(self, images: Tensor, text: Tensor) -> Scores:
        """Score images against the text features of their categories; see :class:`SDP`."""
        return self._score_against(self.tokens(images, scoring=True), text)

    def score_tokens(self, tokens: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens of images of given categories; see the base class."""
        return self._score_against(tokens, self.texts(categories))

    def _score_against(self, tokens: dict[str, Tensor], text: Tensor) -> Scores:
        tokens = {key: value.float() for key, value in tokens.items()}
        with self.backbone.out_of_autocast():
            projected = [tokens[f"projected.{stage}"] for stage in self.stages]
            class_token = tokens.get("class_token", projected[-1][:, 0])
            similarity = self.similarity(projected, text)
            size = (self.image_size, self.image_size)
            trained = self.stage_maps([tokens[f"raw.{s}"] for s in self.stages], text, size)
            maps = gaussian_blur(self.upsample(similarity) + trained.sum(dim=0), self.blur)
            r0 = text_score(class_token, text)
            r1 = image_score(maps, "max")
        return Scores(image_score=r0, anomaly_map=maps, score_parts=torch.stack([r0, r1], dim=1))

    @torch.no_grad()
    def tokens(self, images: Tensor, *, scoring: bool) -> dict[str, Tensor]:
        """Return the tokens of the frozen image tower, in the dtype of the tower.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            scoring: True: return all tokens that scoring needs. False: return only those that a
                training step needs.

        Returns:
            ``raw.{stage}`` ``(B, N, W)`` for each stage: the patches of the original path. For
            scoring also ``projected.{stage}`` ``(B, 1 + N, D)`` and, if ``stages`` omits the last
            stage, ``class_token`` ``(B, D)``.
        """
        with self.backbone.out_of_autocast():
            tokens, class_token = self.encode(images)
        numbered = list(zip(self.stages, tokens, strict=True))
        first = self.backbone.num_prefix_tokens
        tokens_by_name = {f"raw.{stage}": token.raw[:, first:] for stage, token in numbered}
        if scoring:
            tokens_by_name |= {f"projected.{stage}": token.projected for stage, token in numbered}
            if self.stages[-1] != self.backbone.num_layers:
                tokens_by_name["class_token"] = class_token
        return tokens_by_name

    def token_options(self, scoring: bool) -> str:
        """Return the options that the tokens depend on."""
        return f"{self.stages} {self.stage_tokens}"

    def stage_maps(self, stages: Sequence[Tensor], text: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the probability maps of the trained layers; see :mod:`.linear_layers`."""
        return stage_maps(self.fc, stages, text, size)

    def losses(self, tokens: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the focal and dice losses, summed over the stages."""
        mask, dataset_name = batch["mask"], self.auxiliary_data.dataset_name
        text = torch.stack([self.text(name, dataset_name) for name in batch["category"]])
        raw = [tokens[f"raw.{stage}"] for stage in self.stages]
        return segmentation_losses(
            self.stage_maps(raw, text, (mask.shape[-2], mask.shape[-1])), mask
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam without a schedule, as published."""
        return torch.optim.Adam(self.fc.parameters(), lr=self.lr)

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return "linear_layers.pth"

    def export(self, folder: Path) -> Path:
        """Write the layers in the authors' format."""
        file = folder / self.export_name
        write_linear_layers(self.fc, file, LAYERS_KEY)
        return file
