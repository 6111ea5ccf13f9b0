"""Linear probe on the pooled features of a backbone (TAB, arXiv 2312.09480, Table 3).

One linear layer classifies the pooled features of a ResNet. The ResNet is either frozen, with its
features computed once, or trained together with the layer. The paper gives no further details:
optimiser, schedule and split are our choice; see docs/methods/linear_probe.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import MetricCollection

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings, load_network
from anomaly_clip.backbones.frozen import fingerprint
from anomaly_clip.backbones.required_kinds import cnn_settings_of
from anomaly_clip.callbacks import DataWaitMonitor
from anomaly_clip.errors import check_at_least
from anomaly_clip.methods.evaluated import (
    Confusion,
    EvaluatedModule,
    check_backbone,
    frozen_dtype,
    missing_data_module,
    without_backbone,
)
from anomaly_clip.methods.linear_probe_classes import check_same, check_shown
from anomaly_clip.methods.linear_probe_optim import ProbeOptim
from anomaly_clip.metric_values import CLASS_METRICS, with_means
from anomaly_clip.metrics.classification import CONFUSION, Targets, class_metrics
from anomaly_clip.progress import track
from anomaly_clip.records import RANDOM, Batch, LoaderNeeds, WeightsRecord

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.samples import SampleDataset

__all__ = ["LinearProbe", "ProbeOptim"]

POOLED = "pooled"


class LinearProbe(EvaluatedModule):
    """Classify the images of a data set with a linear layer; see the module's docstring.

    The data module defines the classes (``data.targets``). single: one class per image, with
    softmax and cross-entropy. multi: several patterns per image, with one sigmoid per pattern.

    Args:
        backbone: The ResNet and its weights. For another network, set its ``layers`` to the layer
            whose features are classified. This layer must not be spatial.
        image_size: Side of the images, in pixels.
        frozen: Whether the backbone stays unchanged, in evaluation mode. If false, the backbone is
            trained as well, and the training images are flipped at random.
        cache_features: Whether a frozen backbone encodes all images at the start of ``fit`` and the
            features stay in memory (512 values per image). If false, the images are encoded again
            in every epoch.
        optim: Optimiser and schedule.
        seed: Seed of the linear layer's initial weights and of the flips.
    """

    must_be_fitted: ClassVar[bool] = True
    can_be_fitted: ClassVar[bool] = True
    is_detector: ClassVar[bool] = False
    not_exportable: ClassVar[str | None] = "classifies images, and has no scores of anomalies"
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"cache_features"})
    head: nn.Linear
    """The linear layer; it is created once the classes are known."""
    metrics: MetricCollection
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone = CNNSettings(),
        image_size: int = 224,
        frozen: bool = True,
        cache_features: bool = True,
        optim: ProbeOptim = ProbeOptim(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("model.image_size", image_size, 32)
        check_at_least("model.seed", seed, 0)
        reason = "it classifies the pooled layer of one"
        self.backbone_settings = cnn_settings_of(backbone, "LinearProbe", reason)
        self.image_size = image_size
        self.frozen = frozen
        self.cache_features = cache_features
        self.optim = optim if isinstance(optim, ProbeOptim) else ProbeOptim(**optim)
        self.seed = seed
        if frozen:
            self._take(backbone)
        else:
            self._make_encoder()
        self.target_names: list[str] = []
        """The classes, in the order of the layer's outputs; empty until they are known."""
        self.targets: Targets = "single"
        self.epochs: int | None = None
        """Number of trained epochs of the loaded checkpoint; None if none was loaded."""
        self._counts: Tensor | None = None
        settings: dict[str, Any] = {"backbone": self.backbone_settings, "optim": self.optim}
        self.save_hyperparameters(ignore=list(settings))
        self.save_hyperparameters({name: asdict(value) for name, value in settings.items()})

    # -- the network -----------------------------------------------------------------------------

    def _take(self, backbone: CNNSettings | CNNBackbone) -> None:
        """Use a frozen backbone.

        Raises:
            ValueError: If the backbone does not expose the selected layer, or the layer is spatial.
        """
        [layer] = self._layers()
        if isinstance(backbone, CNNBackbone):
            self.backbone = backbone
        else:
            self.backbone = CNNBackbone.of(replace(self.backbone_settings, layers=[layer]))
        if layer not in self.backbone.channels or layer in self.backbone.strides:
            raise ValueError(
                f"model.backbone.layers must name a layer that is not spatial for LinearProbe, "
                f"such as pooled, got [{layer}]"
            )
        self.layer, self.width = layer, self.backbone.channels[layer]

    def _make_encoder(self) -> None:
        """Create the ResNet to train; its weights are loaded by a fit or from a checkpoint.

        Raises:
            ValueError: If the network is not a ResNet, or a layer other than pooled is selected.
        """
        name = self.backbone_settings.name
        self.encoder = load_network(name, RANDOM)
        is_resnet = all(hasattr(self.encoder, part) for part in ("conv1", "layer4", "fc"))
        if not is_resnet or self._layers() != [POOLED]:
            raise ValueError(
                f"with model.frozen false, LinearProbe needs a ResNet and its pooled layer, got "
                f"model.backbone.name {name} and layers {self._layers()}: choose a ResNet and "
                f"leave out model.backbone.layers, or set model.frozen to true"
            )
        self.width = int(self.encoder.fc.weight.shape[1])  # type: ignore[union-attr,index]
        self.encoder.fc = nn.Identity()
        for key, values in (
            ("mean", self.backbone_settings.mean),
            ("std", self.backbone_settings.std),
        ):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        random = self.backbone_settings.weights == RANDOM
        self._start = WeightsRecord(
            backbone=name, pretrained=self.backbone_settings.weights, random=random, sha256=None
        )

    def _layers(self) -> list[str]:
        layers = self.backbone_settings.layers or [POOLED]
        if len(layers) != 1:
            raise ValueError(
                f"model.backbone.layers must name a single layer for LinearProbe, such as pooled, "
                f"got {layers}"
            )
        return list(layers)

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Loader requirements: no batch of one image in training, on which BatchNorm fails."""
        return LoaderNeeds(self.image_size, full_batches=not self.frozen)

    @property
    def weights(self) -> WeightsRecord:
        """The weights of a frozen backbone, or the initial weights of a trained one."""
        return self.backbone.weights if self.frozen else self._start

    def pooled(self, images: Tensor) -> Tensor:
        """Return the features ``(B, C)`` of uint8 images ``(B, 3, H, W)``."""
        if self.frozen:
            with torch.no_grad():
                features: Tensor = self.backbone(images)[self.layer]
            return features
        trained: Tensor = self.encoder((images / 255 - self.mean) / self.std)
        return trained

    def logits(self, features: Tensor) -> Tensor:
        """Return float32 logits ``(B, K)`` of features ``(B, C)``."""
        with torch.autocast(self.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits.float()

    # -- the classes -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the classes from the data, create the linear layer and load the initial weights.

        Raises:
            FileNotFoundError: If the weights are neither on disk nor available for download.
            ValueError: If the data defines no classes, the classes differ from those already set,
                or a class has no images.
        """
        data = self.data
        if data is None:
            raise missing_data_module(self, stage)
        if data.targets is None:
            raise ValueError(
                f"LinearProbe classifies images, but {data.dataset_name} has no class targets: use "
                f"--data MixedWM38"
            )
        if data.auxiliary is not None or data.synthesis is not None:
            raise ValueError(
                "LinearProbe trains on labelled training images only: leave out "
                f"data.{'synthesis' if data.auxiliary is None else 'auxiliary'}"
            )
        if stage == "fit" and not self.frozen and data.batch_size < 2:
            raise ValueError(
                f"data.batch_size must be 2 or more, as BatchNorm needs several images in a batch, "
                f"got {data.batch_size}"
            )
        self._set_classes(data.targets, data.target_names, f"data.root {data.root}")
        if stage == "fit":
            check_shown(data, self.target_names, "training", data.fit_samples())
        check_shown(data, self.target_names, "test", data.samples("test"))
        self.metrics = class_metrics(self.targets, len(self.target_names))
        if self.frozen:
            dtype = frozen_dtype(str(self.trainer.precision), self.trainer.strategy.root_device)
            if dtype is not None:
                self.backbone.cast(dtype)
        elif stage == "fit" and not self._start["random"]:
            start = load_network(self.backbone_settings.name, self.backbone_settings.weights)
            start.fc = nn.Identity()
            self.encoder.load_state_dict(start.state_dict())
            self._start["sha256"] = fingerprint(self.encoder)

    def _set_classes(self, targets: Targets, names: list[str], source: str) -> None:
        """Set the classes and create the layer for them, or compare them with those already set.

        Raises:
            ValueError: If the classes differ from those already set, or there are fewer than two.
        """
        if self.target_names:
            check_same((self.targets, self.target_names), (targets, names), source)
            return
        if len(names) < 2:
            raise ValueError(
                f"LinearProbe needs at least 2 classes, and {source} has {len(names)}: use data "
                f"with more classes"
            )
        self.targets, self.target_names = targets, list(names)
        with torch.random.fork_rng(devices=[]):
            # Initial weights depend on the seed alone, not on earlier random numbers.
            torch.manual_seed(self.seed)
            self.head = nn.Linear(self.width, len(names))

    def configure_callbacks(self) -> list[Callback]:
        """Return a callback that logs how long the training waits for images."""
        return [DataWaitMonitor()]

    # -- the training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Encode all images once with a frozen backbone; see ``cache_features``."""
        if not (self.frozen and self.cache_features) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.data is not None
        for dataset in self.data.unchanging_datasets().values():
            dataset.hold_features({POOLED: self._pooled_of_all(dataset, self.data)})

    def _pooled_of_all(self, dataset: SampleDataset, data: AnomalyData) -> Tensor:
        """Return the features of all images, float32 ``(n, C)``; processes share the work."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = range(rank, len(dataset), world)
        loader = DataLoader(Subset(dataset, rows), data.batch_size, num_workers=data.num_workers)
        each = math.ceil(len(dataset) / world)
        # All processes gather tensors of the same size.
        features_here = torch.zeros(each, self.width, device=self.device)
        done = 0
        for batch in track(loader, "encoding", total=len(loader)):
            features = self.pooled(batch["image"].to(self.device)).float()
            features_here[done : done + len(features)] = features
            done += len(features)
        gathered = self.all_gather(features_here)
        assert isinstance(gathered, Tensor)
        table = gathered.reshape(world, each, self.width).transpose(0, 1)
        return table.reshape(world * each, self.width)[: len(dataset)].cpu()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        if "features" in batch:
            features = batch["features"][POOLED]
        else:
            images = batch["image"]
            features = self.pooled(images if self.frozen else self._flipped(images, batch["index"]))
        logits = self.logits(features)
        target = self._target(batch)
        if self.targets == "single":
            loss = F.cross_entropy(logits, target)
            right = logits.argmax(dim=1) == target
        else:
            loss = F.binary_cross_entropy_with_logits(logits, target.float())
            right = ((logits > 0) == target.bool()).all(dim=1)
        count = len(target)
        accuracy = right.float().mean()
        options: dict[str, Any] = {"batch_size": count, "sync_dist": True}
        self.log("train/accuracy", accuracy, on_step=False, on_epoch=True, **options)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        return loss

    def _target(self, batch: Batch) -> Tensor:
        """Return int64 classes ``(B,)``, or int64 indicators of the patterns ``(B, K)``."""
        target = batch["target"].long()
        return target.argmax(dim=1) if self.targets == "single" else target

    def _flipped(self, images: Tensor, index: Tensor) -> Tensor:
        """Flip images ``(B, 3, H, W)`` at random along each axis; their classes stay the same."""
        seeds = [[self.seed, self.current_epoch, row] for row in index.tolist()]
        flips = np.stack([np.random.default_rng(seed).random(2) < 0.5 for seed in seeds])
        for axis in (0, 1):
            is_flipped = torch.from_numpy(flips[:, axis]).to(images.device)
            images = torch.where(is_flipped.view(-1, 1, 1, 1), images.flip(2 + axis), images)
        return images

    def configure_optimizers(self) -> Any:
        """Return SGD and its learning rate schedule; see :class:`ProbeOptim`."""
        return self.optim.of(self.frozen).build(self)

    # -- metrics ---------------------------------------------------------------------------------

    def probabilities(self, batch: Batch) -> Tensor:
        """Return the classes' probabilities, float32 ``(B, K)``.

        Raises:
            ValueError: If the logits are not finite, because the training has diverged.
        """
        cached = "features" in batch
        features = batch["features"][POOLED] if cached else self.pooled(batch["image"])
        logits = self.logits(features)
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            path = batch["path"][int((~finite).nonzero()[0])]
            raise ValueError(
                f"{path}: the probe's output is NaN or infinite, because the training diverged: "
                f"fit again with a lower model.optim.lr"
            )
        return logits.softmax(dim=1) if self.targets == "single" else logits.sigmoid()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities of a batch and update the metrics."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities of a batch and update the metrics."""
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities of a batch; none of its images may have been readable."""
        if not batch["path"]:
            return torch.zeros(0, len(self.target_names))
        return self.probabilities(batch)

    def on_validation_epoch_end(self) -> None:
        """Compute and log the metrics as ``val/...``."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the metrics as ``test/...``."""
        self._finish("test")

    def _evaluate(self, batch: Batch) -> Tensor:
        probabilities = self.probabilities(batch)
        self.metrics.update(probabilities, self._target(batch))
        return probabilities

    def _finish(self, prefix: str) -> None:
        values = self.metrics.compute()
        self.metrics.reset()
        self._counts = values[CONFUSION].cpu()
        metrics: dict[str, float | None] = {name: float(values[name]) for name in CLASS_METRICS}
        assert self.data is not None
        [category] = self.data.categories
        self.results = with_means({category: metrics}, {})
        self.log_metrics(prefix, metrics)

    @property
    def confusion(self) -> Confusion | None:
        """The confusion matrix of the last evaluation; None before the first one."""
        return None if self._counts is None else Confusion(self._counts, self.target_names)

    def image_rows(self, outputs: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the true class, the predicted class and the probabilities of each image.

        Args:
            outputs: Probabilities ``(B, K)``.
            batch: The batch of the outputs.
        """
        rows = []
        for place, values in enumerate(outputs.tolist()):
            true = batch["target"][place].tolist()
            row: dict[str, Any] = {
                "path": batch["path"][place],
                "category": batch["category"][place],
                "label": int(batch["label"][place]),
            }
            if self.targets == "single":
                best = int(np.argmax(values))
                row |= {"true": self.target_names[true.index(True)]}
                row |= {"predicted": self.target_names[best], "probability": values[best]}
            else:
                row |= {"true": self._joined(true)}
                row |= {"predicted": self._joined([value > 0.5 for value in values])}
                row |= dict(zip(self.target_names, values, strict=True))
            rows.append(row)
        return rows

    def _joined(self, is_present: list[bool]) -> str:
        names = [name for name, on in zip(self.target_names, is_present, strict=True) if on]
        return "+".join(names) or "good"

    @property
    def evaluation_note(self) -> str:
        """End of the title of the metrics table: whether the backbone was frozen or trained."""
        return f"; backbone {'frozen' if self.frozen else 'trained'}"

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the probe to record with the metrics."""
        return {
            "frozen": self.frozen,
            "classes": len(self.target_names),
            "optim": asdict(self.optim.of(self.frozen)),
            "epochs": self.epochs,
        }

    # -- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the classes, and the identity of a frozen backbone in place of its weights."""
        record: dict[str, Any] = {"targets": self.targets, "names": self.target_names}
        record["weights"] = dict(self.weights)
        if self.frozen:
            record["identity"] = self.backbone.identity
            checkpoint["state_dict"] = without_backbone(checkpoint["state_dict"])
        checkpoint["probe"] = record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the classes, or set them if unknown, and insert a frozen backbone's weights.

        Raises:
            ValueError: If the checkpoint was fitted with other classes or another backbone.
        """
        record = checkpoint["probe"]
        weights: WeightsRecord = record["weights"]
        fitted = record["targets"], record["names"]
        if self.target_names:
            check_same(fitted, (self.targets, self.target_names), "the data")
        else:  # loaded without a trainer
            self._set_classes(*fitted, "the checkpoint")
        self.epochs = checkpoint.get("epoch")
        if not self.frozen:
            self._start = weights
            return
        check_backbone(weights, record["identity"], self.weights, self.backbone.identity)
        backbone = {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **backbone}
