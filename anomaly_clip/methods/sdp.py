"""SDP of CLIP-AD (arXiv 2311.00453): zero-shot detection with a staged dual path.

The normal and the abnormal prompts are reduced to one text vector each (representative vector
selection). A second path through the image tower with the same weights uses value-value attention,
which keeps patch features local. At the end of each of four stages, the patches are compared with
the two text vectors. Each text vector is weighted by its similarity to the class token (feature
surgery). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, Tokens, unit
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.backbones.surgery import NUM_STAGES, StageTokens, check_stages, encode_dual_path
from anomaly_clip.errors import check_at_least
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.prompted_method import PromptedMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Scores, UseOfShots

__all__ = ["SDP", "feature_surgery", "text_score"]


class SDP(PromptedMethod):
    """Zero-shot anomaly detection with CLIP (CLIP-AD, arXiv 2311.00453; docs/methods/sdp.md).

    Args:
        backbone: The CLIP model.
        prompts: States and templates of the normal and the abnormal prompts.
        rvs: Reduction of the prompts of a class to one vector.
        stages: Stages whose maps are summed, each given by the number of its last block (1-based);
            default: all four. With paths original, a tower that cannot be divided into four stages
            has its layers instead; default: the last one.
        paths: surgery: patch tokens of value-value attention (the method). original: CLIP's own
            patch tokens (Figure 1 of the paper).
        stage_tokens: official: the tokens of a stage include the attention output of the next
            block, as in the published code. clean: the tokens are the output of the stage's last
            block. This option is ignored with paths original, which always uses clean tokens.
        feature_surgery: true: each of the two text vectors is weighted by its similarity to the
            class token, and patches are compared with the difference. false: patches are compared
            with the abnormal text vector alone by cosine similarity (our choice, for the ablation).
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        evaluator: Settings of the metrics.
    """

    must_be_fitted: ClassVar[bool] = False
    can_be_fitted: ClassVar[bool] = False
    score_part_names: ClassVar[tuple[str, ...]] = ("r0", "r1")
    use_of_shots: ClassVar[UseOfShots] = "none"
    reads_raw_patches: ClassVar[bool] = False
    """True if ``encode`` must also return the patches of the original path, at some extra cost."""

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        prompts: PromptEnsemble = PromptEnsemble(),
        rvs: RVSSettings = RVSSettings(),
        stages: list[int] | None = None,
        paths: Literal["surgery", "original"] = "surgery",
        stage_tokens: StageTokens = "official",
        feature_surgery: bool = True,
        sigma: float = 8.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(prompts, rvs, evaluator)
        self.backbone = CLIPBackbone.of(backbone)
        self.stages = self._check_stages(stages, paths)
        self.paths = paths
        self.stage_tokens = stage_tokens
        self.feature_surgery = feature_surgery
        self.sigma = sigma
        check_at_least("model.sigma", sigma, 0)
        settings: dict[str, Any] = {
            "backbone": self.backbone.settings,
            "prompts": self.prompts,
            "rvs": self.rvs,
        }
        self.save_hyperparameters(ignore=[*settings, "evaluator"], logger=False)
        self.save_hyperparameters({k: asdict(v) for k, v in settings.items()}, logger=False)

    def _check_stages(self, stages: list[int] | None, paths: str) -> list[int]:
        """Return the stage ends or, with paths original, layers of a tower without stages."""
        backbone = self.backbone
        if paths == "surgery":
            _ = backbone.blocks  # refuses towers without value-value attention
        elif backbone.num_layers % NUM_STAGES:
            return backbone.check_layers(stages)
        return check_stages(stages, backbone.num_layers)

    @torch.no_grad()
    def score_with_text(self, images: Tensor, text: Tensor) -> Scores:
        """Score images against the text features of their categories.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            text: ``(B, D, 2)``, unit columns: normal, abnormal.

        Returns:
            The blurred map. ``image_score`` and the first score part are the text score r0. The
            second score part is the maximum r1 of the map.
        """
        with self.backbone.out_of_autocast():  # cosines and softmaxes stay in float32
            tokens, class_token = self.encode(images)
            similarity = self.similarity([stage.projected for stage in tokens], text)
            maps = gaussian_blur(self.upsample(similarity), self.sigma)
            r0 = text_score(class_token, text)
            r1 = image_score(maps, "max")
        return Scores(image_score=r0, anomaly_map=maps, score_parts=torch.stack([r0, r1], dim=1))

    def encode(self, images: Tensor) -> tuple[list[Tokens], Tensor]:
        """Return the tokens of the selected stages, and CLIP's image embedding ``(B, D)``."""
        last = self.backbone.num_layers
        layers = sorted({*self.stages, last})
        if self.paths == "surgery":
            tokens = encode_dual_path(
                self.backbone,
                images,
                layers,
                self.stage_tokens,
                raw_patches=self.reads_raw_patches,
            )
        else:
            tokens = self.backbone(images, layers)
        class_token = tokens[-1].projected[:, 0]
        return [
            t for t, stage in zip(tokens, layers, strict=True) if stage in self.stages
        ], class_token

    def similarity(self, stages: Sequence[Tensor], text: Tensor) -> Tensor:
        """Return token scores ``(B, 1 + N)``, summed over the stages; higher = more abnormal.

        Args:
            stages: Projected tokens ``(B, 1 + N, D)`` of each stage, class token first.
            text: ``(B, D, 2)``.
        """
        if self.feature_surgery:
            return sum(feature_surgery(tokens, text) for tokens in stages)  # type: ignore[return-value]
        abnormal = text[..., 1:]
        return sum((unit(tokens) @ abnormal).squeeze(-1) for tokens in stages)  # type: ignore[return-value]

    def upsample(self, similarity: Tensor) -> Tensor:
        """Upsample token scores ``(B, 1 + N)`` to maps ``(B, H, W)``, without blur."""
        return patches_to_map(similarity[:, 1:], (self.image_size, self.image_size))


def feature_surgery(tokens: Tensor, text: Tensor) -> Tensor:
    """Score the tokens of one stage, with text vectors weighted by the class token.

    Let ``p_normal`` and ``p_abnormal`` be the softmax, without a temperature, of the class token's
    cosines with the two text vectors. For two classes the published product over all channels
    reduces to ``p_abnormal * cos(token, abnormal) - p_normal * cos(token, normal)``. This is a dot
    product of the token with a single direction per image. The score of the normal class is its
    negative. See docs/methods/sdp.md.

    Args:
        tokens: Projected tokens ``(B, 1 + N, D)``, class token first, not normalised.
        text: ``(B, D, 2)``, unit columns: normal, abnormal.

    Returns:
        float32 ``(B, 1 + N)``.
    """
    tokens = unit(tokens)
    weights = (tokens[:, :1] @ text).softmax(dim=-1)  # (B, 1, 2)
    weighted = text * weights
    direction = weighted[..., 1] - weighted[..., 0]  # (B, D)
    return (tokens @ direction.unsqueeze(-1)).squeeze(-1)  # (B, 1 + N)


def text_score(class_token: Tensor, text: Tensor, factor: float = 100.0) -> Tensor:
    """Return the probability r0 ``(B,)`` that an image is abnormal (docs/methods/sdp.md).

    Args:
        class_token: CLIP's image embedding ``(B, D)``, not normalised.
        text: ``(B, D, 2)``, unit columns: normal, abnormal.
        factor: Logit scale, by which the cosines are multiplied before the softmax.
    """
    cosines = (unit(class_token).unsqueeze(1) @ text).squeeze(1)  # (B, 2)
    return (factor * cosines).softmax(dim=-1)[:, 1]
