"""CLIP-ADA (arXiv 2403.09493): a learnable prompt for all categories, trained by self-supervision.

The frozen text tower encodes a prompt of learnable vectors. Patches of an intermediate layer of the
frozen image tower are projected into the text space and compared with the encoded prompt. The
resulting coarse map guides a second pass, the anomaly region refinement. Prompt, projection and
refinement are trained on normal images only, some of which get a synthetic defect.

Only the abstract of the paper and summaries by others were available. They describe one model for
all categories, normal training images only, layer 7, a linear projection, a single prompt,
self-supervision, refinement from coarse to fine with the coarse map as an attention map, and the
similarity with the prompt as anomaly map. Everything else is our choice (reasons in
docs/methods/clip_ada.md): CLIP and image size, number of vectors, temperature, wiring of the
refinement, synthesis, losses, optimiser, smoothing, image score. The published results (detection /
localisation) are 97.5 / 55.6 on MVTec-AD and 89.3 / 33.1 on VisA. We assume that detection is image
AUROC and localisation pixel AP, although localisation may be pixel F1-max.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.learnable_prompt import LearnablePrompt, LearnablePromptSettings
from anomaly_clip.backbones.surgery import encode_layers
from anomaly_clip.constant_tensors import has_values
from anomaly_clip.errors import check_between, check_choice
from anomaly_clip.losses import batch_dice_loss, focal_loss_with_logits
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map, resize_maps
from anomaly_clip.methods.clip_ada_refinement import DenseHead, RefinementSettings, RegionRefinement
from anomaly_clip.methods.clip_ada_settings import (
    POOL,
    SIGMA_SIDE,
    LossSettings,
    MapSettings,
    OptimSettings,
)
from anomaly_clip.methods.clip_method import CLIPMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores
from anomaly_clip.schedules import total_steps, warmup_cosine

__all__ = ["CLIPADA", "LossSettings", "MapSettings", "OptimSettings"]

VALUE_BLOCKS = 2  # with dense "vv": number of blocks, the last being the tap, with such attention
LEAST_TAU, MOST_TAU = 0.01, 1.0
EPS = 1e-6
"""Minimum distance of a probability from 0 and 1 before its logit is computed."""

Settings = TypeVar("Settings")


class PatchLogits(NamedTuple):
    """Anomaly logits of patches, ``(B, N)`` each."""

    coarse: Tensor
    fine: list[Tensor]
    """One tensor per refinement pass; empty without refinement."""
    features: Tensor
    """Projected patches of the last pass, unit length ``(B, N, D)``."""
    image: Tensor | None = None
    """Logits ``(B,)`` of the class token; None without ``class_token``."""


class CLIPADA(CLIPMethod):
    """CLIP with a learnable prompt and anomaly region refinement (docs/methods/clip_ada.md).

    Args:
        backbone: The CLIP model.
        feature_layer: Layer whose patches are compared with the prompt and refined, 1-based
            (paper: 7).
        taps: Layers whose patches form the coarse map, 1-based. Each layer has its own projection,
            and the logits of all layers are averaged. ``feature_layer`` must be one of them.
            Default: ``feature_layer`` alone.
        pre_norm: Apply a LayerNorm without parameters before the projections.
        dense: How the patches of each tap are computed. block: as the layer returns them. vv: by
            value-value attention in the layer of the tap and the layer before it.
        prompt: Settings of the learnable prompt.
        head_init: Initial projections. random: random weights. clip: CLIP's final projection, so
            that with two prompts initialised from text, training starts from a zero-shot map.
        class_token: Also use CLIP's image embedding for the image score (our choice; AnomalyCLIP
            and WinCLIP do so too). The embedding is compared with the prompt in the same way as
            a patch. Its logit is averaged with the logit of the map's image score.
        tau: Temperature of the similarities; the initial temperature with ``learn_tau``.
        learn_tau: Learn the temperature, clamped to [0.01, 1].
        refine: Settings of the refinement pass.
        loss: Weights of the losses.
        optim: Learning rates and their schedule.
        map: Settings of the anomaly map and the image score.
        evaluator: Settings of the metrics.
    """

    start: Tensor
    """:meth:`direction` before training; the drift from it is logged."""
    must_be_fitted: ClassVar[bool] = True
    can_be_fitted: ClassVar[bool] = True
    metric_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "loss"})
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "map", "loss"})

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings("ViT-B-16-quickgelu", "openai", 256),
        feature_layer: int = 7,
        taps: list[int] | None = None,
        pre_norm: bool = True,
        dense: Literal["block", "vv"] = "block",
        prompt: LearnablePromptSettings = LearnablePromptSettings(),
        head_init: Literal["random", "clip"] = "random",
        class_token: bool = False,
        tau: float = 0.07,
        learn_tau: bool = False,
        refine: RefinementSettings = RefinementSettings(),
        loss: LossSettings = LossSettings(),
        optim: OptimSettings = OptimSettings(),
        map: MapSettings = MapSettings(),
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(evaluator)
        check_choice("model.dense", dense, ("block", "vv"))
        check_choice("model.head_init", head_init, ("random", "clip"))
        check_between("model.tau", tau, LEAST_TAU, MOST_TAU)
        self.backbone = CLIPBackbone.of(backbone)
        self.backbone.check_learnable_text("CLIP-ADA")
        self.feature_layer = feature_layer
        self.taps = [feature_layer] if taps is None else list(taps)
        self.backbone.check_layers(self.taps)
        if dense == "vv" and self.taps[0] < VALUE_BLOCKS:
            raise ValueError(
                f"model.dense vv needs {VALUE_BLOCKS} blocks with value-value attention, but the "
                f"first of model.taps is {self.taps[0]}: use layers {VALUE_BLOCKS} and above in "
                f"model.taps, or set model.dense to block"
            )
        if feature_layer not in self.taps:
            raise ValueError(
                f"model.taps {self.taps}: model.feature_layer {feature_layer} is missing; add it"
            )
        self.pre_norm = pre_norm
        self.dense = dense
        prompt = _settings(LearnablePromptSettings, prompt)
        refine = _settings(RefinementSettings, refine)
        self.loss = _settings(LossSettings, loss)
        self.optim = _settings(OptimSettings, optim)
        self.map = _settings(MapSettings, map)
        width, dim = self.backbone.width, self.backbone.embed_dim
        with torch.random.fork_rng(devices=[]):
            # The initial weights depend on the seed alone, not on earlier random numbers.
            seed = torch.initial_seed()
            torch.manual_seed(seed)
            self.prompt = LearnablePrompt(self.backbone, prompt, seed)
            self.heads = nn.ModuleList(DenseHead(width, dim, pre_norm) for _ in self.taps)
            self.refinement = (
                None
                if refine.mode == "none"
                else RegionRefinement(self.backbone, feature_layer, refine, pre_norm)
            )
        if head_init == "clip":
            for module in self.modules():
                if isinstance(module, DenseHead):
                    module.start_from(self.backbone)
        self.class_token = class_token
        if class_token:
            self.class_bias = nn.Parameter(torch.zeros(()))
        self.refine = refine
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)), requires_grad=learn_tau)
        settings: dict[str, Any] = {
            "backbone": self.backbone.settings,
            "prompt": prompt,
            "refine": refine,
            "loss": self.loss,
            "optim": self.optim,
            "map": self.map,
        }
        self.save_hyperparameters(ignore=[*settings, "evaluator"])
        self.save_hyperparameters({name: asdict(value) for name, value in settings.items()})
        with torch.no_grad():
            self.register_buffer("start", self.direction())
        self._text: tuple[int, Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Check that the data module generates synthetic defects; see the base class.

        Raises:
            ValueError: If the data module of ``fit`` generates no synthetic defects.
        """
        super().setup(stage)
        if stage != "fit" or self.data is None:  # custom loaders bring their own defects
            return
        synthesis = self.data.synthesis
        if synthesis is None or synthesis.mode != "replace" or synthesis.share == 0:
            given = "is not set"
            if synthesis is not None:
                given = f"has mode {synthesis.mode} and share {synthesis.share}"
            raise ValueError(
                f"CLIPADA is trained on synthetic defects, but data.synthesis {given}: choose a "
                f"recipe, as in --data.synthesis.recipe perlin, with data.synthesis.mode replace "
                f"and data.synthesis.share above 0"
            )

    def direction(self) -> Tensor:
        """Return the direction ``(D,)`` that patches are compared with: the abnormal text vector.

        With two prompts, the direction is the abnormal minus the normal text vector. The sigmoid of
        the dot product with it then equals the abnormal class's softmax probability.
        """
        text = self.prompt(self.backbone)
        return text[0] if len(text) == 1 else text[1] - text[0]

    def encode(self, images: Tensor, direction: Tensor) -> PatchLogits:
        """Return the logits of patches compared with the prompt, coarse and refined.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            direction: ``(D,)``, see :meth:`direction`.
        """
        blocks = VALUE_BLOCKS if self.dense == "vv" else 0
        layers = list(self.taps)
        if self.class_token and layers[-1] < self.backbone.num_layers:
            layers.append(self.backbone.num_layers)
        with torch.no_grad():
            tokens = encode_layers(self.backbone, images, layers, blocks)
        by_tap = [
            head(layer[:, 1:]) for head, layer in zip(self.heads, tokens, strict=False)
        ]  # (B, N, D)
        coarse = torch.stack([self.logits(features, direction) for features in by_tap]).mean(0)
        at = self.taps.index(self.feature_layer)
        fine: list[Tensor] = []
        features = by_tap[at]
        if self.refinement is not None:
            for _ in range(self.refine.steps):
                guide = (fine[-1] if fine else coarse).sigmoid()
                features = self.refinement(self.backbone, tokens[at], guide)
                fine.append(self.logits(features, direction))
        image = None
        if self.class_token:
            with self.backbone.out_of_autocast():
                embedding = unit(self.backbone.project(tokens[-1][:, 0]))
            image = self.logits(embedding, direction) + self.class_bias
        return PatchLogits(coarse, fine, features, image)

    def logits(self, features: Tensor, direction: Tensor) -> Tensor:
        """Return dot products of features ``(..., D)`` and a direction, divided by temperature."""
        tau = self.log_tau.exp().clamp(LEAST_TAU, MOST_TAU)
        with self.backbone.out_of_autocast():
            if torch.compiler.is_compiling():  # OpenVINO cannot scale a product with a vector
                return (features.float() @ (direction.float() / tau)[:, None]).squeeze(-1)
            return features.float() @ direction.float() / tau

    def fused(self, encoded: PatchLogits) -> Tensor:
        """Return the logits of the final map, ``(B, N)``."""
        if not encoded.fine:
            return encoded.coarse
        last = encoded.fine[-1]
        return last if self.refine.fuse == "fine" else (encoded.coarse + last) / 2

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)``; the categories are not used.

        Returns:
            The blurred map in [0, 1], the image score, and the unblurred maps of the first and the
            last pass (``coarse`` and ``fine``).
        """
        return self._score_with(images, self._direction())

    @torch.no_grad()
    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category; see the base class."""
        if not torch.compiler.is_compiling():
            return super().score_category(images, category)
        direction = self.direction() if self._text is None else self._text[1].to(self.device)
        return self._score_with(images, direction)

    def _score_with(self, images: Tensor, direction: Tensor) -> Scores:
        with self.backbone.out_of_autocast():
            encoded = self.encode(images, direction)
            stages = {"coarse": encoded.coarse}
            if encoded.fine:
                stages["fine"] = encoded.fine[-1]
            settings = self.map
            sigma = settings.sigma * settings.eval_size / SIGMA_SIDE
            maps = gaussian_blur(self._probability_map(self.fused(encoded)), sigma)
            image_score = _image_score(maps, settings.image_score)
            if encoded.image is not None:
                image_score = ((image_score.logit(EPS) + encoded.image) / 2).sigmoid()
            return Scores(
                image_score=image_score,
                anomaly_map=maps,
                stage_maps={name: self._probability_map(logits) for name, logits in stages.items()},
            )

    def _direction(self) -> Tensor:
        """Return :meth:`direction`, recomputed only after the prompt has changed."""
        version = self.prompt.context._version
        if self._text is None or self._text[0] != version:
            direction = self.direction()
            if not has_values(direction):  # in a graph that is being traced
                return direction
            self._text = version, direction
        return self._text[1].to(self.device)

    def prepare(self, categories: list[str]) -> None:
        """Clear the cached direction, because weight averaging may have replaced the prompt."""
        self._text = None

    def _probability_map(self, logits: Tensor) -> Tensor:
        """Return probability maps ``(B, E, E)`` of logits ``(B, N)``.

        The logits are upsampled before the sigmoid, because this order preserves peaks.
        """
        upsampled = patches_to_map(logits, (self.image_size, self.image_size)).sigmoid()
        return resize_maps(upsampled, (self.map.eval_size, self.map.eval_size))

    def losses(self, encoded: PatchLogits, mask: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss (docs/methods/clip_ada.md).

        Args:
            encoded: Logits of the batch.
            mask: bool ``(B, h, w)``, true on the synthetic defect.
            label: bool ``(B,)``, true for images with a defect.
        """
        last = encoded.fine[-1] if encoded.fine else encoded.coarse
        count = max(1, round(self.loss.image_fraction * last.shape[1]))
        highest = last.topk(count, dim=1).values.mean(dim=1)
        image = F.binary_cross_entropy_with_logits(highest, label.float())
        coarse_weight = self.loss.coarse if encoded.fine else 1.0
        terms = {
            "coarse": coarse_weight * self.segmentation_loss(encoded.coarse, mask),
            "image": self.loss.image * image,
        }
        if encoded.image is not None:
            terms["class_token"] = self.loss.class_token * F.binary_cross_entropy_with_logits(
                encoded.image, label.float()
            )
        if encoded.fine:
            terms["fine"] = torch.stack(
                [self.segmentation_loss(logits, mask) for logits in encoded.fine]
            ).sum()
        return terms

    def segmentation_loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted sum of the focal and dice losses of one map.

        Args:
            logits: ``(B, N)``; this function upsamples them to the size of the mask.
            mask: bool ``(B, h, w)``.
        """
        upsampled = patches_to_map(logits, (mask.shape[-2], mask.shape[-1]))
        probability = upsampled.sigmoid()
        total = self.loss.focal * focal_loss_with_logits(upsampled, mask, self.loss.gamma)
        total = total + self.loss.dice * batch_dice_loss(probability, mask)
        if self.loss.normal_dice > 0:
            total = total + self.loss.normal_dice * batch_dice_loss(1 - probability, ~mask)
        return total

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of normal images, some with synthetic defects."""
        mask = batch["mask"]
        direction = self.direction()
        encoded = self.encode(batch["image"], direction)
        with self.backbone.out_of_autocast():
            terms = self.losses(encoded, mask, batch["label"])
            total = torch.stack(list(terms.values())).sum()
        count = len(mask)
        every = getattr(self.trainer, "log_every_n_steps", 1)
        if (self.global_step + 1) % every == 0:  # reading values makes the host wait for the GPU
            metrics = {f"train/{name}": float(value.detach()) for name, value in terms.items()}
            metrics |= self.diagnostics(encoded, mask, direction)
            self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=count)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=count)
        return total

    @torch.no_grad()
    def diagnostics(
        self, encoded: PatchLogits, mask: Tensor, direction: Tensor
    ) -> dict[str, float]:
        """Return diagnostic values of a batch for the log.

        These are the mean of each map on and off the defects, the drift of the prompt from its
        initial direction (1 - cosine), the cosine of the prompt with patches on defects, the
        temperature if it is learned, and the learning rate of the heads. The refinement adds its
        beta or gamma and the norm of its shift.
        """
        side = math.isqrt(encoded.coarse.shape[1])
        share = F.adaptive_avg_pool2d(mask[:, None].float(), side).flatten(1)  # (B, N)
        some = bool(share.any())
        on = share / share.sum() if some else share  # weight patches by defect coverage
        off = share == 0
        values: dict[str, float] = {}
        stages = {"coarse": encoded.coarse}
        if encoded.fine:
            stages["fine"] = encoded.fine[-1]
        for name, logits in stages.items():
            probability = logits.sigmoid()
            if off.any():
                values[f"train/{name}_off"] = float(probability[off].mean())
            if some:
                values[f"train/{name}_on"] = float((probability * on).sum())
        now = F.normalize(direction.detach(), dim=0)
        values["train/prompt_drift"] = float(1 - F.cosine_similarity(now, self.start, dim=0))
        if some:
            values["train/prompt_cosine_on"] = float((encoded.features @ now * on).sum())
        refinement = self.refinement
        if refinement is not None:
            for name in ("beta", "gamma"):
                if hasattr(refinement, name):
                    values[f"train/{name}"] = float(getattr(refinement, name))
            if hasattr(refinement, "shift"):
                values["train/shift"] = float(refinement.shift.norm())
        if self.log_tau.requires_grad:
            values["train/tau"] = float(self.log_tau.exp())
        if self._trainer is not None and self.trainer.optimizers:
            values["train/lr_head"] = float(self.trainer.optimizers[0].param_groups[1]["lr"])
        return values

    def configure_optimizers(self) -> Any:
        """Return AdamW with three learning rates, and a per-step schedule.

        Raises:
            ValueError: If the number of training steps is unknown.
        """
        steps = total_steps(self, ", or set trainer.max_steps")
        settings = self.optim
        decay = settings.weight_decay
        if self.data is not None and len(self.data.fit_samples()) < settings.few_images:
            decay *= settings.few_factor
        groups = list(self.parameter_groups(decay))
        optimizer = torch.optim.AdamW(groups, lr=settings.lr_head, betas=settings.betas)
        warmup = min(settings.warmup_steps, steps // 20)

        def rate(step: int) -> float:
            return warmup_cosine(step, warmup, steps, settings.last)

        schedule = {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def parameter_groups(self, weight_decay: float) -> Iterator[dict[str, Any]]:
        """Yield the trained parameters, grouped by learning rate and weight decay.

        Weight decay applies to all matrices except the prompt. The groups come in this order:
        the prompt; heads with and without decay; copied blocks with and without decay. Empty groups
        are omitted.
        """
        rates = self.optim
        blocks = [] if self.refinement is None else list(self.refinement.named_parameters())
        copied = [p for name, p in blocks if name.startswith("blocks.")]
        excluded = {id(p) for p in [*copied, self.prompt.context, *self.backbone.parameters()]}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in excluded]
        yield {"params": [self.prompt.context], "lr": rates.lr_prompt, "weight_decay": 0.0}
        for members, lr in ((others, rates.lr_head), (copied, rates.lr_block)):
            for matrices, decay in ((True, weight_decay), (False, 0.0)):
                chosen = [p for p in members if (p.ndim > 1) == matrices]
                if chosen:
                    yield {"params": chosen, "lr": lr, "weight_decay": decay}


def _settings(kind: type[Settings], value: Settings | Mapping[str, Any]) -> Settings:
    """Return settings, converted from the plain dictionary of a checkpoint if necessary."""
    return kind(**value) if isinstance(value, Mapping) else value


def _image_score(maps: Tensor, rule: str) -> Tensor:
    if rule == "max":
        return image_score(maps, "max")
    if rule == "topk_mean":
        return image_score(maps, "top_mean", fraction=0.001)
    return image_score(F.avg_pool2d(maps[:, None], POOL, stride=1)[:, 0], "max")
