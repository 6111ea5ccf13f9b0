"""TAB (arXiv 2312.09480): pre-train a ResNet to align with CLIP's normal and abnormal texts.

CLIP's frozen text encoder yields a normal and an abnormal text vector per class. The ResNet encodes
normal images, and versions of them with a synthetic defect. A softmax over the similarities of a
normal image with the normal vectors of all classes should predict the class of the image. So should
a softmax over the similarities of a defective image with the abnormal vectors. Only the ResNet is
kept: it replaces the ImageNet backbone of detectors.

docs/methods/tab.md states which settings come from the paper, the authors' code, or us.
"""

from __future__ import annotations

import io
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import save
from torch import Tensor, nn

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings, load_network
from anomaly_clip.backbones.prompts import check_prompts, embed_prompts
from anomaly_clip.backbones.required_kinds import check_resnet, cnn_settings_of
from anomaly_clip.backbones.tab_prompts import TABPrompts, text_matrices
from anomaly_clip.callbacks import DataWaitMonitor
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path, write_bytes
from anomaly_clip.losses import softmax_focal_loss
from anomaly_clip.methods.evaluated import data_module, missing_data_module
from anomaly_clip.methods.tab_heads import (
    BatchDraws,
    Head,
    alignment_logits,
    apply_head,
    make_head,
    mean_cosine,
)
from anomaly_clip.methods.tab_optim import TABOptim
from anomaly_clip.progress import say
from anomaly_clip.records import RANDOM, Batch, LoaderNeeds, TrainingFeatures, versions
from anomaly_clip.schedules import total_epochs, total_steps

__all__ = ["TAB", "TABOptim"]

PLOTTED_PAIRS = 300
"""Number of pairs (normal image, defective version) whose features are plotted after a fit."""
HEADS = ("normal_head.", "abnormal_head.", "classifier.")
"""Key prefixes of parts that depend on classes or texts; they are discarded after training."""
SIMILAR_TEXTS = 0.99
"""Mean cosine of the classes' texts above which the softmax is flat: logits differ by 0.03."""
LOGIT_SCALE = math.log(1 / 0.07)
"""Initial value, 2.6593. The authors' code multiplies by it directly, not by its exponential."""


class TAB(LightningModule):
    """Pre-train a ResNet to align with CLIP's texts; see the module's docstring.

    The data module provides normal training images of several categories together with their
    defective versions (``data.synthesis.mode: pair``).

    Args:
        backbone: The ResNet to train, and its initial weights.
        text: The CLIP model that encodes the texts.
        prompts: The prompts.
        loss: align: the method. classification: the baseline of Table 5, cross-entropy without
            texts. concat: focal loss of one image per pair, compared with the normal and abnormal
            texts together (exploratory in the authors' code).
        align: both: align normal and defective images. normal: align only normal images, with the
            normal texts (Table 7).
        classification_targets: Outputs of the classification loss. classes: a normal and an
            abnormal output per class. binary: a single normal and a single abnormal output.
        head: Heads that map features to the width of the texts, one for normal and one for
            defective images; they are discarded after the training. auto: projection if the widths
            differ, else none. none: unchanged features. linear: a linear layer. projection: a
            linear layer, a residual block and a LayerNorm.
        logit_scale_mode: Logit scale. raw: the trained parameter itself (authors' code); exp: its
            exponential (CLIP).
        joint_forward: Whether normal and defective images share a forward pass, and so the
            statistics of BatchNorm.
        optim: Optimiser and schedule.
        image_size: Side of the images, in pixels.
        seed: Seed of the dropout in the projection head, and of the choice of one image per pair
            by the concat loss.
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
        self.settings = cnn_settings_of(backbone, "TAB", "it trains a ResNet")
        check_resnet(self.settings, "TAB")
        self.text = text if isinstance(text, CLIPSettings) else CLIPSettings(**text)
        self.prompts = prompts if isinstance(prompts, TABPrompts) else TABPrompts(**prompts)
        self.optim = optim if isinstance(optim, TABOptim) else TABOptim(**optim)
        check_at_least("model.image_size", image_size, 32)
        if loss == "concat" and (align == "normal" or self.prompts.preset == "one_class"):
            raise ValueError(
                f"model.loss concat needs normal and abnormal texts, got model.align {align} and "
                f"model.prompts.preset {self.prompts.preset}: set model.align to both, and choose "
                f"a preset other than one_class"
            )
        self.loss = loss
        self.align = "normal" if self.prompts.preset == "one_class" else align
        self.classification_targets = classification_targets
        self.head = head
        self.logit_scale_mode = logit_scale_mode
        self.joint_forward = joint_forward
        self._image_size = image_size
        self.seed = seed
        # Initial weights are loaded in setup: a model from a checkpoint does not need them.
        self.encoder = load_network(self.settings.name, RANDOM)
        # The classifier is kept, untrained, because torchvision's strict loading requires it.
        self.encoder.fc.requires_grad_(False)
        self.width = int(self.encoder.fc.weight.shape[1])  # type: ignore[union-attr,index]
        for name, values in (("mean", self.settings.mean), ("std", self.settings.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE), loss != "classification")
        self.categories: list[str] = []
        """The classes, in the order of the texts."""
        self.teacher = ""
        """The sha256 of the CLIP model that encodes the texts, or ``random``."""
        self.provenance: dict[str, Any] = {}
        """Settings outside the arguments that the training depends on."""
        self.epochs: int | None = None
        """Number of trained epochs of the loaded checkpoint; None if none was loaded."""
        self._last: deque[tuple[Tensor, list[str]]] = deque()
        settings: dict[str, Any] = {
            "backbone": self.settings,
            "text": self.text,
            "prompts": self.prompts,
            "optim": self.optim,
        }
        self.save_hyperparameters(ignore=list(settings))
        self.save_hyperparameters({name: asdict(value) for name, value in settings.items()})

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self._image_size

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Loader requirements: no batch of one image, on which BatchNorm fails."""
        return LoaderNeeds(self.image_size, full_batches=True)

    # -- classes, texts and heads ----------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the initial weights, encode the texts of the classes, and create the heads.

        Raises:
            FileNotFoundError: If the weights are neither on disk nor available for download.
            ValueError: If there are fewer than two classes, the data has no defective versions, the
                batch size or the validation split is unsuitable, or the widths differ and ``head``
                is none.
        """
        data = data_module(self)
        if data is None:
            raise missing_data_module(self, stage)
        categories = data.train_categories
        if len(categories) < 2:
            raise ValueError(
                f"TAB needs at least 2 training categories, got {len(categories)} of data.root "
                f"{data.root}: select more with data.categories"
            )
        if self.align == "both" and (data.synthesis is None or data.synthesis.mode != "pair"):
            mode = "no data.synthesis"
            if data.synthesis is not None:
                mode = f"data.synthesis.mode {data.synthesis.mode}"
            raise ValueError(
                f"TAB needs a defective version of each normal image, got {mode}: set "
                f"data.synthesis.recipe, such as nsa, and data.synthesis.mode to pair"
            )
        if data.batch_size < 2:
            raise ValueError(
                f"data.batch_size must be 2 or more, as BatchNorm needs several images in a batch, "
                f"got {data.batch_size}"
            )
        if data.validation.kind not in ("none", "synthetic"):
            raise ValueError(
                f"TAB is validated on held-out normal images and their defective versions, not on "
                f"data.val_split {data.val_split}: set data.val_split to synthetic or none"
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
            # The heads' initial weights depend on the run's seed alone.
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
        for name in names:
            check_prompts(clip, name, *self.prompts.for_category(name))
        encode = partial(embed_prompts, clip, title="encoding the prompts", unit_rows=False)
        texts = text_matrices(encode, names, self.prompts)
        alike = mean_cosine(texts.normal)
        if alike > SIMILAR_TEXTS:
            say(
                f"CLIP's text vectors of the {len(names)} classes are almost the same (mean cosine "
                f"{alike:.4f}), which leaves little to learn: choose another model.text, or set "
                f"model.prompts.centered to sides"
            )
        self.register_buffer("normal", texts.normal, persistent=False)
        abnormal = texts.normal if texts.abnormal is None else texts.abnormal
        self.register_buffer("abnormal", abnormal, persistent=False)

    def configure_callbacks(self) -> list[Callback]:
        """Return a callback that logs how long the training waits for images."""
        return [DataWaitMonitor()]

    # -- the training ----------------------------------------------------------------------------

    def pooled(self, images: Tensor) -> Tensor:
        """Return the average-pooled last stage ``(B, C)`` of uint8 images ``(B, 3, H, W)``."""
        net = self.encoder
        maps = net.relu(net.bn1(net.conv1((images / 255 - self.mean) / self.std)))  # type: ignore[operator]
        for stage in (net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4):
            maps = stage(maps)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))

    def both_pooled(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return features ``(B, C)`` of normal images and, if needed, of the defective versions."""
        if self.align == "normal":
            return self.pooled(batch["image"]), None
        if self.joint_forward:
            normal, abnormal = self.pooled(torch.cat([batch["image"], batch["synthetic"]])).chunk(2)
            return normal, abnormal
        return self.pooled(batch["image"]), self.pooled(batch["synthetic"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of normal images and their defective versions."""
        target = torch.tensor(
            [self.categories.index(name) for name in batch["category"]], device=self.device
        )
        normal, abnormal = self.both_pooled(batch)
        if abnormal is not None:
            self._keep(normal, abnormal, batch["category"])
        with torch.autocast(self.device.type, enabled=False):
            normal = normal.float()
            abnormal = None if abnormal is None else abnormal.float()
            key = [self.seed, self.current_epoch, batch_idx]
            rng = BatchDraws(key, self.trainer.world_size, self.global_rank)
            total, metrics = self.losses(normal, abnormal, target, rng)
            if abnormal is not None:
                cosine = F.cosine_similarity(normal.detach(), abnormal.detach())
                metrics["cosine"] = cosine.mean()
        if self.loss != "classification":
            metrics["logit_scale"] = self.scale().detach()
        count = len(target)
        logged = {f"train/{name}": value for name, value in metrics.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=count)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on held-out images, both normal and with a synthetic defect."""
        target = torch.tensor(
            [self.categories.index(name) for name in batch["category"]], device=self.device
        )
        features = self.pooled(batch["image"])
        sides = ["normal"] if self.align == "normal" else ["normal", "abnormal"]
        for side in sides:
            chosen = batch["label"] == (side == "abnormal")
            if chosen.any():
                with torch.autocast(self.device.type, enabled=False):
                    pair = self._logits_and_columns(side, features[chosen].float(), target[chosen])
                    concat = self.loss == "concat"
                    loss = softmax_focal_loss(*pair, 2.0) if concat else F.cross_entropy(*pair)
                count = int(chosen.sum())
                self.log(f"val/loss_{side}", loss, batch_size=count, sync_dist=True)
                # Twice the mean over all images is the sum of the two means, normal and defective,
                # if there are as many normal as defective images.
                scaled = len(sides) * loss
                self.log("val/loss", scaled, batch_size=count, prog_bar=True, sync_dist=True)

    def _logits_and_columns(
        self,
        side: str,
        features: Tensor,
        target: Tensor,
        rng: BatchDraws | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits and target columns of images that are all normal or all defective."""
        abnormal = side == "abnormal"
        count = len(self.categories)
        if self.loss == "classification":
            binary = self.classification_targets == "binary"
            first = torch.zeros_like(target) if binary else target
            return self.classifier(features), first + abnormal * (1 if binary else count)
        headed = apply_head(self.abnormal_head if abnormal else self.normal_head, features, rng)
        if self.loss == "concat":
            texts = torch.cat([self.normal, self.abnormal])
            return alignment_logits(headed, texts, self.scale()), target + abnormal * count
        texts = self.abnormal if abnormal else self.normal
        return alignment_logits(headed, texts, self.scale()), target

    def _keep(self, normal: Tensor, abnormal: Tensor, categories: list[str]) -> None:
        """Keep the features of the last batches for the plot after the fit."""
        both = torch.stack([normal, abnormal], dim=1).detach().float()  # (B, 2, C)
        self._last.append((both, categories))
        while sum(len(names) for _, names in self._last) - len(self._last[0][1]) >= PLOTTED_PAIRS:
            self._last.popleft()

    def losses(
        self,
        normal: Tensor,
        abnormal: Tensor | None,
        target: Tensor,
        rng: BatchDraws | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (docs/methods/tab.md) and the values to log.

        Args:
            normal: Features of normal images, ``(B, C)``.
            abnormal: Features of their defective versions, ``(B, C)``; None to leave them out.
            target: int64 ``(B,)``, the classes.
            rng: Random numbers of the dropout in the projection head, and of the choice of one
                image per pair by the concat loss, which requires them; None for no dropout.
        """
        if self.loss == "concat":
            assert abnormal is not None
            assert rng is not None
            return self._concat(normal, abnormal, target, rng)
        sides = {"normal": normal} if abnormal is None else {"normal": normal, "abnormal": abnormal}
        metrics: dict[str, Tensor] = {}
        for name, features in sides.items():
            logits, columns = self._logits_and_columns(name, features, target, rng)
            metrics[f"loss_{name}"] = F.cross_entropy(logits, columns)
            metrics[f"top1_{name}"] = (logits.argmax(dim=1) == columns).float().mean()
        total = metrics["loss_normal"] + metrics.get("loss_abnormal", 0.0)
        return total, {name: value.detach() for name, value in metrics.items()}

    def scale(self) -> Tensor:
        """Return the logit scale."""
        return self.logit_scale.exp() if self.logit_scale_mode == "exp" else self.logit_scale

    def _concat(
        self, normal: Tensor, abnormal: Tensor, target: Tensor, rng: BatchDraws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        defective = torch.from_numpy(rng.random((len(target),)) < 0.5).to(target.device)
        features = torch.where(
            defective.unsqueeze(1),
            apply_head(self.abnormal_head, abnormal, rng),
            apply_head(self.normal_head, normal, rng),
        )
        logits = alignment_logits(features, torch.cat([self.normal, self.abnormal]), self.scale())
        columns = target + defective * len(self.categories)
        total = softmax_focal_loss(logits, columns, gamma=2.0)
        top1 = (logits.argmax(dim=1) == columns).float().mean()
        return total, {"top1": top1}

    def configure_optimizers(self) -> Any:
        """Return the optimiser and, if configured, a learning rate schedule stepped per epoch.

        Raises:
            ValueError: If the length of the training is unknown.
        """
        optimizer = self.optim.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.optim.scheduler_t_max == "none":
            return optimizer
        schedule = self.optim.schedule(optimizer, total_steps(self), total_epochs(self))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # -- export and checkpoints ------------------------------------------------------------------

    @property
    def export_name(self) -> str:
        """Name of the file that the ResNet is exported to."""
        return f"tab_{self.settings.name}.safetensors"

    def export(self, folder: Path) -> Path:
        """Write the ResNet with torchvision's names as .safetensors and .pt, and a .json record.

        Returns:
            The .safetensors file.
        """
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in self.encoder.state_dict().items()
        }
        stem = self.export_name.removesuffix(".safetensors")
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(folder / f"{stem}.pt", content.getbuffer())
        write_bytes(folder / f"{stem}.safetensors", save(state))
        with atomic_path(folder / f"{stem}.json") as temporary:
            temporary.write_text(json.dumps(self.record(), indent=2) + "\n", encoding="utf-8")
        return folder / self.export_name

    def training_features(self) -> TrainingFeatures | None:
        """Return the features of the last pairs of images, None for fewer than two pairs."""
        if sum(len(names) for _, names in self._last) < 2:
            return None
        pairs = torch.cat([both for both, _ in self._last])[-PLOTTED_PAIRS:].cpu()  # (P, 2, C)
        classes = [name for _, names in self._last for name in names][-PLOTTED_PAIRS:]
        return TrainingFeatures(
            features=pairs.flatten(0, 1).numpy(),  # (2P, C)
            categories=[name for name in classes for _ in range(2)],
            anomalous=[False, True] * len(classes),
        )

    def record(self) -> dict[str, Any]:
        """Return the provenance of the exported weights."""
        epochs = self.epochs if self._trainer is None else self.current_epoch
        return {
            "method": "TAB",
            **{name: value for name, value in self.hparams.items() if not name.startswith("_")},
            **self.provenance,
            "categories": self.categories,
            "epochs": epochs,
            "text_sha256": self.teacher,
            "versions": versions(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the classes in the order used for training, and the hash of the text encoder."""
        checkpoint["tab"] = {
            "categories": self.categories,
            "teacher": self.teacher,
            "made": self.provenance,
            "epochs": self.current_epoch,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the classes and the hash of the text encoder with the current ones.

        Raises:
            ValueError: If a fit is resumed with other classes or another text encoder.
        """
        fitted = checkpoint["tab"]
        self.epochs = fitted["epochs"]
        if not self.categories:  # loaded without a trainer: the heads are no longer needed
            self.categories, self.teacher = fitted["categories"], fitted["teacher"]
            self.provenance = fitted["made"]
            kept = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {k: v for k, v in kept if not k.startswith(HEADS)}
        if fitted["categories"] != self.categories or fitted["teacher"] != self.teacher:
            raise ValueError(
                f"the checkpoint was fitted with the categories {', '.join(fitted['categories'])} "
                f"and the CLIP {fitted['teacher'][:12] or 'none'}, not "
                f"{', '.join(self.categories)} and {self.teacher[:12] or 'none'}: resume with the "
                f"same data and model.text"
            )
