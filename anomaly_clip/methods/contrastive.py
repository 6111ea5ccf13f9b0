"""Training of the project's small demo CLIP on generated images and captions.

This follows no paper: the design and all constants are our choice (docs/methods/contrastive.md).
Every scene is rendered as a pair of images, without and with a defect. The two images differ in the
defect alone. The loss has these terms:

- *contrast*: CLIP's loss between images and captions. All matching pairs are positives, because
  a caption may match many images.
- *state*: each image should be closer to the prompts of its own state, and the defective image of a
  pair should score higher than the normal one. Both losses use CLIP's final logit scale of 100,
  which zero-shot methods also apply to the class token.
- *local*: patches on a defect should be closer to the abnormal prompts than other patches are, and
  than the corresponding patches of the paired normal image are. The second comparison rules out a
  shortcut: merely marking the object, on which defects lie, does not reduce this loss. Both
  comparisons apply to the patches of the last layer and to the value-value patches that SDP uses.
  The training of the original CLIP has no loss on either kind of patch.
- *indifference*: two random halves of the normal prompts have the same meaning. The difference
  between their mean text vectors must therefore not separate the two images of a pair, or the
  patches on a defect from the other patches of the same image. Only the difference between the
  normal and the abnormal prompts may do so.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, Window, unit
from anomaly_clip.backbones.prompts import PromptEnsemble, check_prompts
from anomaly_clip.backbones.surgery import encode_dual_path, stage_ends
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import write_bytes
from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods.contrastive_captions import Captions, ImageLabels
from anomaly_clip.methods.contrastive_losses import (
    masked_mean,
    multi_positive,
    paired_patch_loss,
    patch_loss,
    squared_effect_size,
)
from anomaly_clip.methods.contrastive_network import PartEmbedding, scale_values
from anomaly_clip.methods.evaluated import data_module
from anomaly_clip.methods.sdp import feature_surgery
from anomaly_clip.metrics import average_precision
from anomaly_clip.records import DEMO, RANDOM, Batch, LoaderNeeds
from anomaly_clip.schedules import total_steps, warmup_cosine

__all__ = ["Contrastive"]

LEAST_RATE = 0.02  # final learning rate as a fraction of the highest
LEAST_SHARE = 0.04
"""A patch counts as defective if the defect covers more than this fraction of it. Patches with a
smaller, nonzero fraction are ignored."""
NUM_PROMPTS = 24  # number of normal prompts in the indifference term
NUM_SPLITS = 8  # number of random halvings of these prompts


class StepOutputs(NamedTuple):
    """Outputs of a step for its training metrics; two images per scene: normal, defective."""

    state: Tensor
    """``(2n,)``, higher = more abnormal."""
    fused: Tensor
    """``(2n, N)``, patch scores of SDP."""
    targets: Tensor
    """``(2n, N)``, see :meth:`Contrastive.patch_targets`."""


class Contrastive(LightningModule):
    """Train a small CLIP on scenes that are rendered in pairs, without and with a defect.

    The data module is :class:`~anomaly_clip.data.Demo` with ``num_scenes``. Training can start on
    small windows of the images, at less than half the cost. It starts with strengthened defects,
    because these are learned faster.

    Args:
        backbone: Architecture and initial weights.
        prompts: States and templates of the captions.
        lr: Peak learning rate of AdamW, with a linear warm-up and a cosine decay to 2 %.
        warmup_steps: Number of warm-up steps.
        weight_decay: Weight decay, applied to matrices only.
        contrast_weight: Weight of the contrast term.
        state_weight: Weight of each of the two losses of the state term.
        local_weight: Weight of the local loss that classifies patches as normal or defective.
        local_order_weight: Weight of the local loss that compares patches within a pair.
        indifference_weight: Weight of the indifference term.
        indifference_from: Fraction of the training after which the indifference term starts. Before
            that, prompts have no meaning yet.
        windows: Mapping from the side of a window in pixels (a multiple of the patch size) to the
            fraction of the training at which its use ends. After the last window, whole images are
            used. Default: no windows.
        strengthening: Maximum factor by which defects are amplified at the start of the training; 1
            leaves them unchanged.
        strengthened_share: Fraction of the training after which defects have their original
            strength.
        value_gain: Factor by which the value projections of the attention are multiplied at
            initialisation. The output projections are divided by it, so that only value-value
            attention changes. Without the factor, this attention would be nearly uniform.
        logit_scale: Constant logit scale. 100 is CLIP's final value, which zero-shot methods use.
        seed: Seed of captions, windows and lighting.
    """

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(DEMO, RANDOM),
        prompts: PromptEnsemble = PromptEnsemble(),
        lr: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        contrast_weight: float = 0.25,
        state_weight: float = 2.0,
        local_weight: float = 4.0,
        local_order_weight: float = 4.0,
        indifference_weight: float = 2.0,
        indifference_from: float = 0.3,
        windows: dict[int, float] | None = None,
        strengthening: float = 3.0,
        strengthened_share: float = 0.5,
        value_gain: float = 2.0,
        logit_scale: float = 100.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("model.lr", lr, 0)
        check_at_least("model.strengthening", strengthening, 1)
        check_at_least("model.value_gain", value_gain, 0.001)
        check_at_least("model.logit_scale", logit_scale, 0.001)
        check_at_least("model.seed", seed, 0)
        self.backbone = CLIPBackbone.of(backbone)
        self.backbone.check_learnable_text("contrastive training")
        # Plain dictionaries come from recorded hyper-parameters.
        prompts = PromptEnsemble(**prompts) if isinstance(prompts, dict) else prompts
        settings: dict[str, Any] = {"backbone": self.backbone.settings, "prompts": prompts}
        self.save_hyperparameters(ignore=list(settings))
        self.save_hyperparameters({name: asdict(value) for name, value in settings.items()})
        model = self.backbone.model.requires_grad_(True)
        model.logit_scale.requires_grad_(False).fill_(math.log(logit_scale))
        self.prompts = prompts
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.contrast_weight = contrast_weight
        self.state_weight = state_weight
        self.local_weight = local_weight
        self.local_order_weight = local_order_weight
        self.indifference_weight = indifference_weight
        self.indifference_from = indifference_from
        self.steps = sorted((share, side) for side, share in (windows or {}).items())
        self.strengthening = strengthening
        self.strengthened_share = strengthened_share
        self.seed = seed
        self.trained_on: dict[str, Any] = {}
        """Training data according to a checkpoint; see :meth:`training_record`."""
        self.stages = stage_ends(self.backbone.num_layers)
        num_sources = len(self.stages) + 2
        # One scale and offset per source of patch scores, discarded after training.
        self.local_scale = nn.Parameter(torch.full((num_sources,), math.log(10.0)))
        self.local_offset = nn.Parameter(torch.full((num_sources,), -2.0))
        self.captions = Captions(prompts, self.backbone.vocabulary)
        tokens = self.backbone.tokenize(self.captions.lasting())
        model.token_embedding = PartEmbedding(model.token_embedding, tokens)
        patch = self.backbone.patch_size
        for _, side in self.steps:
            if side % patch or not patch <= side <= self.image_size:
                raise ValueError(
                    f"model.windows {side}: expected sides that are multiples of the patch size "
                    f"{patch} and at most the image size {self.image_size}"
                )
        if self.backbone.is_random:
            scale_values(self.backbone, value_gain)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.backbone.image_size

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Requirements on the data loaders: images of side ``image_size``, in whole epochs."""
        return LoaderNeeds(self.image_size, whole_epochs=True)

    def setup(self, stage: str) -> None:
        """Check that the data module renders scenes.

        Raises:
            ValueError: If the data module renders none, or if the number of steps is unlimited.
        """
        data = data_module(self)
        if data is None:
            raise ValueError(
                f"{type(self).__name__} is trained on rendered scenes, but there is no data "
                f"module: use --data Demo and set --data.num_scenes"
            )
        if data.num_scenes is None:
            raise ValueError(
                f"{type(self).__name__} is trained on rendered scenes, but data.num_scenes of "
                f"{type(data).__name__} is not set: set --data.num_scenes, which requires "
                f"--data Demo"
            )
        for category in data.categories:
            check_prompts(self.backbone, category, *self.captions.prompts.for_category(category))
        total_steps(
            self, ", or set trainer.max_steps"
        )  # raises if the number of steps is unlimited

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of scenes."""
        key = [self.seed, self.global_step, self.global_rank]
        if self.trainer.accumulate_grad_batches > 1:  # several batches share a step
            key.append(batch_idx)
        rng = np.random.default_rng(key)
        done = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
        kind = self.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with self.backbone.out_of_autocast():
            losses, outputs = self.losses(batch, rng, done, mixed)
        total = torch.stack(list(losses.values())).sum()
        if not bool(total.detach().isfinite()):  # the metrics refuse such values; the fit ends
            return total
        # Every scene is new, so these metrics are measured on unseen scenes.
        normal, defective = outputs.state.unflatten(0, (-1, 2)).unbind(1)  # (n,) each
        counted = outputs.targets >= 0
        metrics = {f"train/{name}": float(value.detach()) for name, value in losses.items()}
        # Fraction of scenes whose class tokens identify the defective image of the pair.
        metrics["train/pair_accuracy"] = float((defective > normal).float().mean())
        precision = average_precision(outputs.fused[counted], outputs.targets[counted] > 0)
        # In rare batches no defect covers a patch. The average precision is NaN then.
        metrics["train/patch_ap"] = 0.0 if math.isnan(precision) else precision
        count = len(normal)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def configure_optimizers(self) -> Any:
        """Return AdamW, with weight decay on matrices only, and a per-step schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        steps = total_steps(self)

        def rate(step: int) -> float:  # warm-up and cosine are multiplied
            warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warmup * warmup_cosine(step, 0, steps, LEAST_RATE)

        schedule = {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record of the training data, for an export without a trainer."""
        checkpoint["trained_on"] = self.training_record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that training can resume from the checkpoint.

        Raises:
            ValueError: If the checkpoint has a different architecture, or was saved in the middle
                of an epoch: the remaining scenes of that epoch could not be reproduced.
        """
        self.trained_on = checkpoint.get("trained_on", {})
        state = self.state_dict()
        for key, value in checkpoint["state_dict"].items():
            if key not in state or state[key].shape != value.shape:
                raise ValueError(
                    f"the checkpoint has a different architecture from "
                    f"{self.backbone.settings.name}: its {key} does not fit; set model.backbone to "
                    f"the backbone of the checkpoint"
                )
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if not progress["is_last_batch"]:
            raise ValueError(
                f"the checkpoint was saved in the middle of an epoch, after batch "
                f"{progress['current']['ready']}: resume from a checkpoint saved at the end of an "
                f"epoch"
            )

    def losses(
        self,
        batch: Batch,
        rng: np.random.Generator,
        done: float,
        mixed: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], StepOutputs]:
        """Return the weighted terms of the loss, and the outputs for the training metrics.

        Args:
            batch: Scenes with ``image``, ``synthetic``, ``synthetic_mask``, ``category`` and
                ``defect``.
            rng: Generator for windows, lighting and captions.
            done: Completed fraction of the training.
            mixed: dtype of the matrix products in the image tower; default: float32. Text features,
                projections and cosines always stay in float32.
        """
        images, masks, window = self.windows(batch, rng, done)
        images, tones = self.relight(images, rng)
        labelled = [
            ImageLabels(category, kind, tone)
            for category, defect, tone in zip(
                batch["category"], batch["defect"], tones, strict=True
            )
            for kind in (None, defect)
        ]
        captions = [self.captions.draw(image, rng) for image in labelled]
        words = unit(self.backbone.encode_text([caption.text for caption in captions]))
        # The captions of a class are reduced to one direction, as in zero-shot methods.
        text = torch.stack([unit(words[0::2].mean(0)), unit(words[1::2].mean(0))], dim=1)  # (D, 2)

        pixels = (images.flatten(0, 1) - self.backbone.mean) / self.backbone.std  # (2n, 3, S, S)
        stages = encode_dual_path(self.backbone, pixels, window=window, mixed=mixed)
        classes = unit(stages[-1].projected[:, 0])  # (2n, D)
        scale = self.backbone.model.logit_scale.exp()
        fits = torch.tensor([[c.fits(p) for c in captions] for p in labelled], device=self.device)
        contrast = multi_positive(scale * classes @ words.T, fits)

        difference = text[:, 1] - text[:, 0]
        state = scale * classes @ difference  # (2n,)
        labels = torch.arange(len(state), device=self.device) % 2
        targets = self.patch_targets(masks)
        direction = unit(difference)
        # Fused map of SDP; the text features are scaled so that their difference has unit length.
        scaled = (text / difference.norm()).expand(len(state), -1, -1)  # (2n, D, 2)
        fused = torch.stack([feature_surgery(s.projected, scaled)[:, 1:] for s in stages]).sum(0)
        patches = [unit(self.backbone.project(stages[-1].raw[:, 1:]))]
        patches += [unit(stage.projected[:, 1:]) for stage in stages]
        sources = [fused, *(features @ direction for features in patches)]
        local, local_order = [], []
        for source, gain, offset in zip(sources, self.local_scale, self.local_offset, strict=True):
            local.append(patch_loss(gain.exp() * source + offset, targets))
            local_order.append(paired_patch_loss(gain.exp() * source, targets))
        normal, defective = state.unflatten(0, (-1, 2)).unbind(1)  # (n,) each
        terms = {
            "contrast": self.contrast_weight * contrast,
            "state": self.state_weight * F.binary_cross_entropy_with_logits(state, labels.float()),
            "order": self.state_weight * F.softplus(normal - defective).mean(),
            "local": self.local_weight * torch.stack(local).mean(),
            "local_order": self.local_order_weight * torch.stack(local_order).mean(),
        }
        if self.indifference_weight > 0 and done >= self.indifference_from:
            directions = self.null_directions(str(rng.choice(batch["category"])), rng)
            apart = [squared_effect_size(*(classes @ directions).unflatten(0, (-1, 2)).unbind(1))]
            on, off = targets[1::2] > 0, targets[1::2] == 0
            for features in patches:
                values = features[1::2] @ directions  # (n, N, R), defective images only
                apart.append(
                    squared_effect_size(masked_mean(values, off), masked_mean(values, on), values)
                )
            terms["indifference"] = self.indifference_weight * torch.stack(apart).mean()
        return terms, StepOutputs(state.detach(), fused.detach(), targets)

    def windows(
        self, batch: Batch, rng: np.random.Generator, done: float
    ) -> tuple[Tensor, Tensor, Window | None]:
        """Return pairs ``(n, 2, 3, S, S)`` in [0, 1], masks ``(n, S, S)`` and a patch grid window.

        Early in the training, ``model.windows`` crops each pair at its own random place, so that
        the crop contains part of the defect. The position embeddings do not follow the crops: all
        crops of a batch use those of one random window of the patch grid. The window is None for
        whole images.
        """
        images = torch.stack([batch["image"], batch["synthetic"]], dim=1).float() / 255
        masks = batch["synthetic_mask"]
        if done < self.strengthened_share:
            most = 1 + (self.strengthening - 1) * (1 - done / self.strengthened_share)
            factors = 1 + (most - 1) * rng.uniform(0.3, 1, len(images))
            change = images[:, 1] - images[:, 0]
            change = change * torch.from_numpy(factors).to(images).view(-1, 1, 1, 1)
            images = torch.stack([images[:, 0], (images[:, 0] + change).clamp(0, 1)], dim=1)
        size = self.image_size
        side = next((side for share, side in self.steps if done < share), size)
        if side == size:
            return images, masks, None
        cut_images, cut_masks = [], []
        for pair, mask in zip(images, masks, strict=True):
            inside = mask.nonzero()
            point = inside[rng.integers(len(inside))].tolist() if len(inside) else (0, 0)
            low = [max(0, at - side + 1) for at in point]
            high = [min(at, size - side) for at in point]
            top, left = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
            cut_images.append(pair[:, :, top : top + side, left : left + side])
            cut_masks.append(mask[top : top + side, left : left + side])
        patch = self.backbone.patch_size
        free = (size - side) // patch + 1
        window = Window(int(rng.integers(free)), int(rng.integers(free)), side // patch)
        return torch.stack(cut_images), torch.stack(cut_masks), window

    def relight(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, list[str | None]]:
        """Return scenes with changed lighting, and for each the tone that captions may name."""
        tones: list[str | None] = []
        changed = []
        for pair in images:
            kind = rng.random()
            gain, offset = rng.uniform(0.8, 1.25), rng.uniform(-0.08, 0.08, (1, 3, 1, 1))
            tone, lit = None, pair
            if kind < 0.1:
                tone, gain = "bright", rng.uniform(1.35, 1.7)
            elif kind < 0.2:
                tone, gain = "dark", rng.uniform(0.4, 0.62)
            elif kind < 0.28:
                tone, lit = "blurry", gaussian_blur(pair, 1.1)
            if rng.random() < 0.15:  # monochrome cameras
                lit = lit.mean(dim=1, keepdim=True).expand_as(lit)
                offset = offset[:, :1]
            changed.append((lit * gain + torch.from_numpy(offset).to(lit)).clamp(0, 1))
            tones.append(tone)
        return torch.stack(changed), tones

    def patch_targets(self, masks: Tensor) -> Tensor:
        """Return per-patch targets ``(2n, N)``: 1 defect, 0 none, -1 ignored (hardly covered).

        The normal image of each scene comes before the defective one.
        """
        share = F.avg_pool2d(masks[:, None].float(), self.backbone.patch_size).flatten(1)  # (n, N)
        defective = torch.where(share > LEAST_SHARE, 1.0, torch.where(share > 0, -1.0, 0.0))
        return torch.stack([torch.zeros_like(share), defective], dim=1).flatten(0, 1)

    def null_directions(self, category: str, rng: np.random.Generator) -> Tensor:
        """Return unit directions ``(D, R)`` between two random halves of the normal prompts."""
        words = unit(self.backbone.encode_text(self.captions.same(category, NUM_PROMPTS, rng)))
        directions = []
        for _ in range(NUM_SPLITS):
            order = torch.from_numpy(rng.permutation(NUM_PROMPTS))
            first, second = (words[part] for part in order.to(words.device).chunk(2))
            directions.append(unit(first.mean(0)) - unit(second.mean(0)))
        return unit(torch.stack(directions)).T  # (D, R)

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return "clip.safetensors"

    def training_record(self) -> dict[str, Any]:
        """Return what the CLIP was trained on: by the trainer, or according to its checkpoint.

        It is empty for a checkpoint of version 0.1.0, which does not tell.
        """
        if self._trainer is None:
            return self.trained_on
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        scenes = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return {
            "categories": data.train_categories,
            "held_out_defects": data.held_out_defects,
            "pictures": 2 * scenes * trainer.global_step,
            "data_seed": data.seed,
            "seed": self.seed,
        }

    def export(self, folder: Path) -> Path:
        """Write the trained CLIP as ``clip.safetensors``, float16, with open_clip's keys.

        The metadata of the file records the training data.
        """
        model = self.backbone.model
        state = model.state_dict()
        state["token_embedding.weight"] = model.token_embedding.merged()
        del state["token_embedding.rows"]
        record = self.training_record()
        file = folder / self.export_name
        halves = {key: value.half().contiguous().cpu() for key, value in state.items()}
        write_bytes(file, save(halves, {"trained_on": json.dumps(record)}))
        return file
