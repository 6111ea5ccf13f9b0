"""How the small CLIP that comes with the project is trained: pictures made by code, words for them.

No paper does this: the design and all constants are our choice. Every scene is shown twice, without
and with a defect, so that nothing but the defect tells the two apart. The terms:

- *contrast*: pictures and sentences that fit belong together, all others apart; as in CLIP, but
  with all pairs that fit as positives, as many pictures share a sentence;
- *state*: of the words for normal and for abnormal, those that fit a picture win, and the defective
  one of two twins is the more abnormal; both with the factor of 100 that CLIP ends with, at which
  zero-shot methods read the class token;
- *local*: patches on a defect are nearer to the words for abnormal than others are. It is asked of
  the last layer's patches and of the value-value patches that SDP reads, for which real CLIPs were
  never trained. And patches on a defect are nearer than the same ones of the normal twin: that an
  object is where defects are does not help there;
- *indifference*: two halves of the sentences for normal, which mean the same, must not tell a
  scene's pictures or patches apart: what tells them apart is the words, not any two vectors.
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, Window, unit
from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.backbones.surgery import encode_dual_path, stage_ends
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path
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

LEAST_RATE = 0.02  # share of the learning rate that is left at the end
LEAST_SHARE = 0.04  # of a patch that a defect covers; patches with less are left out
NUM_SENTENCES = 24  # of the indifference term, and
NUM_SPLITS = 8  # how often they are halved


class StepOutputs(NamedTuple):
    """Outputs that the losses of a step depend on, two images a scene: normal, defective."""

    state: Tensor
    """``(2n,)``, higher = more abnormal."""
    fused: Tensor
    """``(2n, N)``, SDP's map of the patches."""
    targets: Tensor
    """``(2n, N)``, see :meth:`Contrastive.patch_targets`."""


class Contrastive(LightningModule):
    """Train a small CLIP on scenes without and with a defect.

    The data module is :class:`~anomaly_clip.data.Demo` with ``num_scenes``. The first part of the
    training sees small windows of the pictures, which costs less than half; and defects stronger
    than they are, which shows sooner what is asked for.

    Args:
        backbone: The architecture; pretrained says where to start from.
        prompts: States and templates of the sentences.
        lr: Highest learning rate of AdamW; warm-up, then a cosine down to 2 %.
        warmup_steps: Steps of the warm-up.
        weight_decay: Of matrices.
        contrast_weight: Weight of the contrast term.
        state_weight: Weight of the two terms of the state.
        local_weight: Weight of the local term.
        local_order_weight: Weight of the comparison of patches between twins.
        indifference_weight: Weight of the indifference term.
        indifference_from: Share of the training before it begins: first there must be words.
        windows: Sides of windows in pixels, multiples of the patch, and the share of the training
            until which each is seen; whole pictures after the last. Default: none.
        strengthening: How much stronger defects are at most in the beginning; 1 for not at all.
        strengthened_share: Share of the training until they are as they are.
        value_gain: By what values are multiplied at the start, and output projections divided:
            nothing changes but value-value attention, which is nearly uniform otherwise.
        logit_scale: What cosines are multiplied by, constant; 100 is what CLIP ends with and what
            zero-shot methods put in.
        seed: Draws sentences, windows and light.
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
        self.save_hyperparameters(ignore=["backbone", "prompts"])
        self.save_hyperparameters({"prompts": asdict(prompts)})
        check_at_least("model.lr", lr, 0)
        check_at_least("model.strengthening", strengthening, 1)
        check_at_least("model.value_gain", value_gain, 0.001)
        check_at_least("model.logit_scale", logit_scale, 0.001)
        check_at_least("model.seed", seed, 0)
        self.backbone = CLIPBackbone.of(backbone)
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
        self.stages = stage_ends(self.backbone.num_layers)
        num_sources = len(self.stages) + 2
        # One scale and offset a source of patches, thrown away after training.
        self.local_scale = nn.Parameter(torch.full((num_sources,), math.log(10.0)))
        self.local_offset = nn.Parameter(torch.full((num_sources,), -2.0))
        self.captions = Captions(prompts, self.backbone.vocabulary)
        tokens = self.backbone.tokenize(self.captions.lasting())
        model.token_embedding = PartEmbedding(model.token_embedding, tokens)
        patch = self.backbone.patch_size
        for _, side in self.steps:
            if side % patch or not patch <= side <= self.image_size:
                raise ValueError(
                    f"model.windows, {side}: expected a multiple of the patch size {patch}, at "
                    f"most {self.image_size}"
                )
        if self.backbone.is_random:
            scale_values(self.backbone, value_gain)

    @property
    def image_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.backbone.image_size

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders: images of its size."""
        return LoaderNeeds(self.image_size)

    def setup(self, stage: str) -> None:
        """Check that the data are scenes.

        Raises:
            ValueError: If they are not.
        """
        data = data_module(self)
        if data is None or data.num_scenes is None:
            raise ValueError(
                "Contrastive learns from scenes without and with a defect: use --data Demo and "
                "give --data.num_scenes"
            )
        total_steps(self)  # raises if the training has no end

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
        # Every scene is new, so what is measured here is measured on scenes never trained on.
        normal, defective = outputs.state.unflatten(0, (-1, 2)).unbind(1)  # (n,) each
        counted = outputs.targets >= 0
        figures = {f"train/{name}": float(value.detach()) for name, value in losses.items()}
        # The share of scenes whose class token tells which of the two has the defect.
        figures["train/pair_accuracy"] = float((defective > normal).float().mean())
        precision = average_precision(outputs.fused[counted], outputs.targets[counted] > 0)
        # NaN where no patch is covered, which is rare.
        figures["train/patch_ap"] = 0.0 if math.isnan(precision) else precision
        count = len(normal)
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def configure_optimizers(self) -> Any:
        """Return AdamW, without decay of what is no matrix, and a rate that follows the step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        steps = total_steps(self)

        def rate(step: int) -> float:  # warm-up and cosine are multiplied here
            warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warmup * warmup_cosine(step, 0, steps, LEAST_RATE)

        schedule = {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what cannot be gone on with.

        Raises:
            ValueError: If the checkpoint is of another architecture, or from the middle of an
                epoch, whose other scenes would not be found again.
        """
        state = self.state_dict()
        for key, value in checkpoint["state_dict"].items():
            if key not in state or state[key].shape != value.shape:
                raise ValueError(
                    f"the checkpoint is of another architecture than {self.backbone.settings.name}"
                    f" (its {key} does not fit)"
                )
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if not progress["is_last_batch"]:
            raise ValueError(
                "the checkpoint is from the middle of an epoch: go on from one of an epoch's end"
            )

    def losses(
        self,
        batch: Batch,
        rng: np.random.Generator,
        done: float,
        mixed: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], StepOutputs]:
        """Return the terms of the loss, weighted, and what they were computed from.

        Args:
            batch: Scenes: ``image``, ``synthetic``, ``synthetic_mask``, ``category``, ``defect``.
            rng: Draws windows, light and sentences.
            done: The share of the training that is over.
            mixed: Type of the image tower's matrix products, default float32; words, projections
                and cosines are always in float32.
        """
        images, masks, window = self.windows(batch, rng, done)
        images, tones = self.relight(images, rng)
        shown = [
            ImageLabels(category, kind, tone)
            for category, defect, tone in zip(
                batch["category"], batch["defect"], tones, strict=True
            )
            for kind in (None, defect)
        ]
        captions = [self.captions.draw(picture, rng) for picture in shown]
        words = unit(self.backbone.encode_text([caption.sentence for caption in captions]))
        # A class of sentences is read as one direction, as zero-shot methods do.
        text = torch.stack([unit(words[0::2].mean(0)), unit(words[1::2].mean(0))], dim=1)  # (D, 2)

        pixels = (images.flatten(0, 1) - self.backbone.mean) / self.backbone.std  # (2n, 3, S, S)
        stages = encode_dual_path(self.backbone, pixels, window=window, mixed=mixed)
        classes = unit(stages[-1].projected[:, 0])  # (2n, D)
        scale = self.backbone.model.logit_scale.exp()
        fits = torch.tensor([[c.fits(p) for c in captions] for p in shown], device=self.device)
        contrast = multi_positive(scale * classes @ words.T, fits)

        difference = text[:, 1] - text[:, 0]
        state = scale * classes @ difference  # (2n,)
        labels = torch.arange(len(state), device=self.device) % 2
        targets = self.patch_targets(masks)
        direction = unit(difference)
        # The fused map of SDP; the difference of the words is brought to the others' length.
        read = (text / difference.norm()).expand(len(state), -1, -1)  # (2n, D, 2)
        fused = torch.stack([feature_surgery(s.projected, read)[:, 1:] for s in stages]).sum(0)
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
                read = features[1::2] @ directions  # (n, N, R), the defective pictures
                apart.append(
                    squared_effect_size(masked_mean(read, off), masked_mean(read, on), read)
                )
            terms["indifference"] = self.indifference_weight * torch.stack(apart).mean()
        return terms, StepOutputs(state.detach(), fused.detach(), targets)

    def windows(
        self, batch: Batch, rng: np.random.Generator, done: float
    ) -> tuple[Tensor, Tensor, Window | None]:
        """Return twins ``(n, 2, 3, S, S)`` in [0, 1], masks ``(n, S, S)`` and where they lie.

        In the first part of the training they are cut to a window that holds a piece of the
        defect; all lie at the same random place of the grid of patches.
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
        for twins, mask in zip(images, masks, strict=True):
            inside = mask.nonzero()
            place = inside[rng.integers(len(inside))].tolist() if len(inside) else (0, 0)
            low = [max(0, at - side + 1) for at in place]
            high = [min(at, size - side) for at in place]
            top, left = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
            cut_images.append(twins[:, :, top : top + side, left : left + side])
            cut_masks.append(mask[top : top + side, left : left + side])
        patch = self.backbone.patch_size
        free = (size - side) // patch + 1
        window = Window(int(rng.integers(free)), int(rng.integers(free)), side // patch)
        return torch.stack(cut_images), torch.stack(cut_masks), window

    def relight(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, list[str | None]]:
        """Change the light of scenes; return them and what their words may say of it."""
        tones: list[str | None] = []
        changed = []
        for twins in images:
            kind = rng.random()
            gain, offset = rng.uniform(0.8, 1.25), rng.uniform(-0.08, 0.08, (1, 3, 1, 1))
            tone, lit = None, twins
            if kind < 0.1:
                tone, gain = "bright", rng.uniform(1.35, 1.7)
            elif kind < 0.2:
                tone, gain = "dark", rng.uniform(0.4, 0.62)
            elif kind < 0.28:
                tone, lit = "blurry", gaussian_blur(twins, 1.1)
            if rng.random() < 0.15:  # cameras without colour
                lit = lit.mean(dim=1, keepdim=True).expand_as(lit)
                offset = offset[:, :1]
            changed.append((lit * gain + torch.from_numpy(offset).to(lit)).clamp(0, 1))
            tones.append(tone)
        return torch.stack(changed), tones

    def patch_targets(self, masks: Tensor) -> Tensor:
        """Return per-patch targets ``(2n, N)``: 1 defect, 0 none, -1 ignored (hardly covered).

        The patches of a scene's normal image come before those of its defective one.
        """
        share = F.avg_pool2d(masks[:, None].float(), self.backbone.patch_size).flatten(1)  # (n, N)
        defective = torch.where(share > LEAST_SHARE, 1.0, torch.where(share > 0, -1.0, 0.0))
        return torch.stack([torch.zeros_like(share), defective], dim=1).flatten(0, 1)

    def null_directions(self, category: str, rng: np.random.Generator) -> Tensor:
        """Return unit directions ``(D, R)`` between random halves of the prompts for normal."""
        words = unit(self.backbone.encode_text(self.captions.same(category, NUM_SENTENCES, rng)))
        directions = []
        for _ in range(NUM_SPLITS):
            order = torch.from_numpy(rng.permutation(NUM_SENTENCES))
            first, second = (words[part] for part in order.to(words.device).chunk(2))
            directions.append(unit(first.mean(0)) - unit(second.mean(0)))
        return unit(torch.stack(directions)).T  # (D, R)

    @property
    def export_name(self) -> str:
        """The file that the CLIP is written to."""
        return "clip.safetensors"

    def export(self, folder: Path) -> Path:
        """Write the trained CLIP as ``clip.safetensors``, float16, with open_clip's names.

        The file's metadata say what it was trained on.
        """
        model = self.backbone.model
        state = model.state_dict()
        state["token_embedding.weight"] = model.token_embedding.merged()
        del state["token_embedding.rows"]
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        trainer = self.trainer
        scenes = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        record = {
            "categories": data.train_categories,
            "held_out_defects": data.held_out_defects,
            "pictures": 2 * scenes * trainer.global_step,
            "data_seed": data.seed,
            "seed": self.seed,
        }
        file = folder / self.export_name
        with atomic_path(file) as temporary:
            halves = {key: value.half().contiguous().cpu() for key, value in state.items()}
            save_file(halves, temporary, {"trained_on": json.dumps(record)})
        return file
