"""TAB (arXiv 2312.09480): a ResNet whose features follow the words for normal and abnormal.

For every class there is a vector of words for normal and one for abnormal, from CLIP's frozen text
tower. Normal images and their synthetic twins go through the ResNet; of either, the softmax over
the classes of the similarities with its side's vectors should name the class. What remains is the
ResNet, to be plugged into detectors in the place of one from ImageNet.

Marks as [P] (the paper), [C] (the authors' code) and [O] (our choice) are in the specification.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings, load_network
from anomaly_clip.backbones.prompts import embed_sentences
from anomaly_clip.backbones.tab_prompts import TABPrompts, text_matrices
from anomaly_clip.callbacks import DataWaitMonitor
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path
from anomaly_clip.losses import softmax_focal_loss
from anomaly_clip.methods.evaluated import data_module
from anomaly_clip.methods.tab_heads import (
    Head,
    ProjectionHead,
    alignment_logits,
    make_head,
    mean_cosine,
)
from anomaly_clip.methods.tab_optim import TABOptim
from anomaly_clip.progress import say
from anomaly_clip.records import RANDOM, Batch, LoaderNeeds, TrainingFeatures, versions
from anomaly_clip.schedules import total_epochs, total_steps

__all__ = ["TAB", "TABOptim"]

PICTURED = 300
"""Pairs whose features are drawn at the end."""
HEADS = ("normal_head.", "abnormal_head.", "classifier.")
"""Parts that depend on the classes and the texts, thrown away after the training."""
ALIKE = 0.99
"""From this mean cosine of the classes' texts on the softmax is flat: 0.03 between logits."""
LOGIT_SCALE = math.log(1 / 0.07)
"""2.6593, which the authors' code multiplies by as it is, without the exponential."""


class TAB(LightningModule):
    """Pre-train a ResNet along CLIP's texts; see the module.

    The data module gives normal training images of several categories with their defective twins
    (``data.synthesis.mode: pair``).

    Args:
        backbone: The ResNet that is trained, and where it starts from.
        text: The CLIP whose texts are followed.
        prompts: The sentences.
        loss: align: the method. classification: the baseline of Table 5, cross-entropy without
            texts. concat: one image a pair, against the texts of both sides, with the focal loss
            (exploratory in the code).
        align: both; or normal: only normal images, against the texts for normal (Table 7).
        classification_targets: Of loss classification: classes, normal and abnormal of each; or
            binary, normal and abnormal.
        head: What brings features to the texts' width, thrown away afterwards, one a side: auto:
            projection if widths differ, else none; linear; projection: linear, a residual block and
            a LayerNorm.
        logit_scale_mode: raw: the parameter itself (the code); exp: its exponential (CLIP).
        joint_forward: Whether normal and defective images share a forward pass, and so the
            statistics of BatchNorm.
        optim: Optimiser and schedule.
        image_size: Side of the images, in pixels.
        seed: Draws what a projection drops, and which image of a pair loss concat takes.
    """

    normal: Tensor
    abnormal: Tensor

    def __init__(
        self,
        backbone: CNNSettings = CNNSettings(),
        text: CLIPSettings = CLIPSettings("ViT-B-16", "laion400m_e32"),
        prompts: TABPrompts = TABPrompts(),
        loss: Literal["align", "classification", "concat"] = "align",
        align: Literal["both", "normal"] = "both",
        classification_targets: Literal["classes", "binary"] = "classes",
        head: Head = "auto",
        logit_scale_mode: Literal["raw", "exp"] = "raw",
        joint_forward: bool = False,
        optim: TABOptim = TABOptim(),
        image_size: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Plain dictionaries come from checkpoints.
        self.settings = backbone if isinstance(backbone, CNNSettings) else CNNSettings(**backbone)
        self.text = text if isinstance(text, CLIPSettings) else CLIPSettings(**text)
        self.prompts = prompts if isinstance(prompts, TABPrompts) else TABPrompts(**prompts)
        self.optim = optim if isinstance(optim, TABOptim) else TABOptim(**optim)
        check_at_least("model.image_size", image_size, 32)
        if loss == "concat" and (align == "normal" or self.prompts.preset == "one_class"):
            raise ValueError("model.loss concat needs texts of both sides")
        self.loss = loss
        self.align = "normal" if self.prompts.preset == "one_class" else align
        self.classification_targets = classification_targets
        self.head = head
        self.logit_scale_mode = logit_scale_mode
        self.joint_forward = joint_forward
        self._image_size = image_size
        self.seed = seed
        # The weights that it starts from come in setup: a checkpoint needs none.
        self.encoder = load_network(self.settings.name, RANDOM)
        if not all(hasattr(self.encoder, part) for part in ("conv1", "layer4", "fc")):
            raise ValueError(f"model.backbone.name {self.settings.name}: TAB trains ResNets")
        # It stays as it is, so that torchvision loads the result strictly.
        self.encoder.fc.requires_grad_(False)
        self.width = int(self.encoder.fc.weight.shape[1])  # type: ignore[union-attr,index]
        for name, values in (("mean", self.settings.mean), ("std", self.settings.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE), loss != "classification")
        self.categories: list[str] = []
        """The classes, in the order of the texts."""
        self.teacher = ""
        """The sha256 of the CLIP that the texts come from."""
        self.provenance: dict[str, Any] = {}
        """What the training depends on beside the arguments."""
        self.epochs: int | None = None
        """How many epochs were trained, if a checkpoint was loaded."""
        self._last: deque[tuple[Tensor, list[str]]] = deque()
        self.save_hyperparameters(
            {
                "backbone": asdict(self.settings),
                "text": asdict(self.text),
                "prompts": asdict(self.prompts),
                "loss": loss,
                "align": align,
                "classification_targets": classification_targets,
                "head": head,
                "logit_scale_mode": logit_scale_mode,
                "joint_forward": joint_forward,
                "optim": asdict(self.optim),
                "image_size": image_size,
                "seed": seed,
            }
        )

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self._image_size

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders: BatchNorm cannot do with a batch of one image."""
        return LoaderNeeds(self.image_size, full_batches=True)

    # -- what is aligned with what ---------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load what the ResNet starts from, encode the texts of the classes, make the heads.

        Raises:
            FileNotFoundError: If weights are neither at hand nor to be had.
            ValueError: If there are fewer than two classes, no defective twins, or widths that
                differ without a head.
        """
        data = data_module(self)
        if data is None:
            raise ValueError("TAB needs a data module of anomaly_clip.data (datamodule=)")
        categories = data.train_categories
        if len(categories) < 2:
            raise ValueError(
                f"TAB tells categories apart, and data.root {data.root} has {len(categories)}: "
                f"give two or more"
            )
        if self.align == "both" and (data.synthesis is None or data.synthesis.mode != "pair"):
            raise ValueError(
                "TAB compares normal images with defective twins: set data.synthesis.recipe, as "
                "nsa, and data.synthesis.mode pair"
            )
        if data.batch_size < 2:
            raise ValueError("data.batch_size must be 2 or more: BatchNorm compares images")
        if data.validation.kind not in ("none", "synthetic"):
            raise ValueError(
                f"TAB is validated on held-out normal images and their defective twins, not on "
                f"data.val_split {data.val_split}: set it to synthetic or none"
            )
        self.categories = list(categories)
        self.provenance = {
            "data": data.dataset_name,
            "synthesis": None if data.synthesis is None else asdict(data.synthesis),
            "data_seed": data.seed,
            "batch_size": data.batch_size,
            "run_seed": torch.initial_seed(),
        }
        if self.settings.weights != RANDOM:
            start = load_network(self.settings.name, self.settings.weights)
            self.encoder.load_state_dict(start.state_dict())
        with torch.random.fork_rng(devices=[]):
            # Heads start from the seed alone, not from what was drawn before.
            torch.manual_seed(torch.initial_seed())
            if self.loss == "classification":
                outputs = 2 if self.classification_targets == "binary" else 2 * len(categories)
                self.classifier = nn.Linear(self.width, outputs)
                return
            self._read_texts([data.words(category) for category in categories])
            sizes = (self.settings.name, self.width), (self.text.name, self.normal.shape[1])
            self.normal_head, self.abnormal_head = (make_head(self.head, *sizes) for _ in range(2))
        if self.align == "normal":
            self.abnormal_head.requires_grad_(False)

    def _read_texts(self, names: Sequence[str]) -> None:
        clip = CLIPBackbone.of(self.text)
        self.teacher = RANDOM if clip.is_random else clip.identity
        encode = partial(embed_sentences, clip, title="encoding the words", unit_rows=False)
        texts = text_matrices(encode, names, self.prompts)
        alike = mean_cosine(texts.normal)
        if alike > ALIKE:
            say(
                f"the texts of the {len(names)} classes are almost the same for this CLIP (mean "
                f"cosine {alike:.4f}), so that there is little to learn: take another model.text, "
                f"or set model.prompts.centered to sides"
            )
        self.register_buffer("normal", texts.normal, persistent=False)
        abnormal = texts.normal if texts.abnormal is None else texts.abnormal
        self.register_buffer("abnormal", abnormal, persistent=False)

    def configure_callbacks(self) -> list[Callback]:
        """Return one that logs how long the training waits for images."""
        return [DataWaitMonitor()]

    # -- the training ----------------------------------------------------------------------------

    def pooled(self, images: Tensor) -> Tensor:
        """Return the averages of the last stage, ``(B, C)``, of uint8 images ``(B, 3, H, W)``."""
        net = self.encoder
        seen = net.relu(net.bn1(net.conv1((images / 255 - self.mean) / self.std)))  # type: ignore[operator]
        for stage in (net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4):
            seen = stage(seen)  # type: ignore[operator]
        return seen.mean(dim=(2, 3))

    def both_pooled(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return features ``(B, C)`` of normal images and, if they are needed, of their twins."""
        if self.align == "normal":
            return self.pooled(batch["image"]), None
        if self.joint_forward:
            normal, abnormal = self.pooled(torch.cat([batch["image"], batch["synthetic"]])).chunk(2)
            return normal, abnormal
        return self.pooled(batch["image"]), self.pooled(batch["synthetic"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of normal images and their twins."""
        target = torch.tensor(
            [self.categories.index(name) for name in batch["category"]], device=self.device
        )
        normal, abnormal = self.both_pooled(batch)
        if abnormal is not None:
            self._keep(normal, abnormal, batch["category"])
        with torch.autocast(self.device.type, enabled=False):
            normal = normal.float()
            abnormal = None if abnormal is None else abnormal.float()
            rng = np.random.default_rng(
                [self.seed, self.current_epoch, batch_idx, self.global_rank]
            )
            total, figures = self.losses(normal, abnormal, target, rng)
            if abnormal is not None:
                cosine = F.cosine_similarity(normal.detach(), abnormal.detach())
                figures["cosine"] = cosine.mean()
        if self.loss != "classification":
            figures["logit_scale"] = self.scale().detach()
        count = len(target)
        named = {f"train/{name}": value for name, value in figures.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=count)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on held-out images, normal ones and ones with a synthetic defect."""
        target = torch.tensor(
            [self.categories.index(name) for name in batch["category"]], device=self.device
        )
        features = self.pooled(batch["image"])
        sides = ["normal"] if self.align == "normal" else ["normal", "abnormal"]
        for side in sides:
            chosen = batch["label"] == (side == "abnormal")
            if chosen.any():
                with torch.autocast(self.device.type, enabled=False):
                    judged = self._judged(side, features[chosen].float(), target[chosen])
                    concat = self.loss == "concat"
                    loss = softmax_focal_loss(*judged, 2.0) if concat else F.cross_entropy(*judged)
                count = int(chosen.sum())
                self.log(f"val/loss_{side}", loss, batch_size=count, sync_dist=True)
                # Twice the mean over all is the sum of both means, if there are as many of either.
                scaled = len(sides) * loss
                self.log("val/loss", scaled, batch_size=count, prog_bar=True, sync_dist=True)

    def _judged(
        self,
        side: str,
        features: Tensor,
        target: Tensor,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits of images of one side, and the columns that should be highest."""
        abnormal = side == "abnormal"
        count = len(self.categories)
        if self.loss == "classification":
            binary = self.classification_targets == "binary"
            first = torch.zeros_like(target) if binary else target
            return self.classifier(features), first + abnormal * (1 if binary else count)
        headed = self._headed(side, features, rng)
        if self.loss == "concat":
            texts = torch.cat([self.normal, self.abnormal])
            return alignment_logits(headed, texts, self.scale()), target + abnormal * count
        texts = self.abnormal if abnormal else self.normal
        return alignment_logits(headed, texts, self.scale()), target

    def _keep(self, normal: Tensor, abnormal: Tensor, categories: list[str]) -> None:
        """Keep the features of the last batches, for the picture at the end."""
        both = torch.stack([normal, abnormal], dim=1).detach().float()  # (B, 2, C)
        self._last.append((both, categories))
        while sum(len(names) for _, names in self._last) - len(self._last[0][1]) >= PICTURED:
            self._last.popleft()

    def losses(
        self,
        normal: Tensor,
        abnormal: Tensor | None,
        target: Tensor,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (equations 4 to 6) and what a log should show.

        Args:
            normal: Features of normal images, ``(B, C)``.
            abnormal: Features of their twins, ``(B, C)``; None to do without.
            target: int64 ``(B,)``, the classes.
            rng: Draws what a projection drops, and which image of a pair loss concat takes; None
                drops nothing.
        """
        if self.loss == "concat":
            assert abnormal is not None
            assert rng is not None
            return self._concat(normal, abnormal, target, rng)
        sides = {"normal": normal} if abnormal is None else {"normal": normal, "abnormal": abnormal}
        figures: dict[str, Tensor] = {}
        for name, features in sides.items():
            logits, columns = self._judged(name, features, target, rng)
            figures[f"loss_{name}"] = F.cross_entropy(logits, columns)
            figures[f"top1_{name}"] = (logits.argmax(dim=1) == columns).float().mean()
        total = figures["loss_normal"] + figures.get("loss_abnormal", 0.0)
        return total, {name: value.detach() for name, value in figures.items()}

    def _headed(self, side: str, features: Tensor, rng: np.random.Generator | None) -> Tensor:
        head = self.normal_head if side == "normal" else self.abnormal_head
        headed: Tensor = head(features, rng) if isinstance(head, ProjectionHead) else head(features)
        return headed

    def scale(self) -> Tensor:
        """Return what cosines are multiplied by."""
        return self.logit_scale.exp() if self.logit_scale_mode == "exp" else self.logit_scale

    def _concat(
        self, normal: Tensor, abnormal: Tensor, target: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        defective = torch.from_numpy(rng.random(len(target)) < 0.5).to(target.device)
        features = torch.where(
            defective.unsqueeze(1),
            self._headed("abnormal", abnormal, rng),
            self._headed("normal", normal, rng),
        )
        logits = alignment_logits(features, torch.cat([self.normal, self.abnormal]), self.scale())
        columns = target + defective * len(self.categories)
        total = softmax_focal_loss(logits, columns, gamma=2.0)
        top1 = (logits.argmax(dim=1) == columns).float().mean()
        return total, {"top1": top1}

    def configure_optimizers(self) -> Any:
        """Return the optimiser, and a rate that follows the epoch.

        Raises:
            ValueError: If the end of the training is not known.
        """
        optimizer = self.optim.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.optim.scheduler_t_max == "none":
            return optimizer
        schedule = self.optim.schedule(optimizer, total_steps(self), total_epochs(self))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # -- what is kept ----------------------------------------------------------------------------

    @property
    def export_name(self) -> str:
        """The file that the ResNet is written to."""
        return f"tab_{self.settings.name}.safetensors"

    def export(self, folder: Path) -> Path:
        """Write the ResNet under torchvision's names, as .safetensors and .pt, with what made it.

        Returns:
            The .safetensors file.
        """
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in self.encoder.state_dict().items()
        }
        stem = self.export_name.removesuffix(".safetensors")
        with atomic_path(folder / f"{stem}.pt") as temporary:
            torch.save(state, temporary)
        with atomic_path(folder / f"{stem}.safetensors") as temporary:
            save_file(state, temporary)
        with atomic_path(folder / f"{stem}.json") as temporary:
            temporary.write_text(json.dumps(self.record(), indent=2) + "\n", encoding="utf-8")
        return folder / self.export_name

    def training_features(self) -> TrainingFeatures | None:
        """Return the last features of normal images and their twins; None of fewer than two."""
        if sum(len(names) for _, names in self._last) < 2:
            return None
        pairs = torch.cat([both for both, _ in self._last])[-PICTURED:].cpu()  # (P, 2, C)
        classes = [name for _, names in self._last for name in names][-PICTURED:]
        return TrainingFeatures(
            features=pairs.flatten(0, 1).numpy(),  # (2P, C)
            categories=[name for name in classes for _ in range(2)],
            anomalous=[False, True] * len(classes),
        )

    def record(self) -> dict[str, Any]:
        """Return what the exported weights come from."""
        epochs = self.epochs if self._trainer is None else self.current_epoch
        return {
            "method": "TAB",
            **dict(self.hparams),
            **self.provenance,
            "categories": self.categories,
            "epochs": epochs,
            "text_sha256": self.teacher,
            "versions": versions(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the classes, whose order the training depends on, and the texts' source."""
        checkpoint["tab"] = {
            "categories": self.categories,
            "teacher": self.teacher,
            "made": self.provenance,
            "epochs": self.current_epoch,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare them.

        Raises:
            ValueError: If a fit goes on with others.
        """
        fitted = checkpoint["tab"]
        self.epochs = fitted["epochs"]
        if not self.categories:  # loaded without a trainer: the heads are not needed any more
            self.categories, self.teacher = fitted["categories"], fitted["teacher"]
            self.provenance = fitted["made"]
            kept = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {k: v for k, v in kept if not k.startswith(HEADS)}
        if fitted["categories"] != self.categories or fitted["teacher"] != self.teacher:
            raise ValueError(
                f"the checkpoint was made with the categories {', '.join(fitted['categories'])} "
                f"and the texts of another CLIP or of other categories: go on with the same"
            )
