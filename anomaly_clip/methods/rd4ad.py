"""RD4AD (arXiv 2201.10703): reverse distillation from a one-class embedding.

The teacher is a frozen CNN. The features of three of its stages are compressed into one small
embedding. The student, a mirrored teacher, reconstructs the features from the embedding. The
student is trained on normal images only, so that a failed reconstruction marks an anomaly. Settings
are those of the public code; see docs/methods/rd4ad.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.maps import gaussian_blur, image_score, resize_maps
from anomaly_clip.methods.feature_method import Select, TrainedMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["RD4AD", "level_maps", "reverse_distillation_loss"]

LEVELS = 3


class RD4AD(TrainedMethod):
    """Reverse distillation (RD4AD, arXiv 2201.10703).

    Args:
        backbone: The teacher; by default, it returns the ``layers`` of this method.
        image_size: Side of the square input images, in pixels.
        layers: Three stages, finest first, each with half the resolution of the one before.
        amap_mode: Combination of the maps of all levels: add (as published) or multiply.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        lr: Learning rate of Adam, whose betas are 0.5 and 0.999.
        select: last: test the last epoch, as published; best_test: test the epoch with the best
            image AUROC on the test images and, among equal ones, the best pixel AUROC.
        seed: Seed of the initial weights.
        evaluator: Settings of the metrics.
    """

    needs_stages: ClassVar[str] = (
        "its student mirrors three stages, each with half the resolution of the one before"
    )
    backbone: CNNBackbone
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "amap_mode", "sigma"})

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone = CNNSettings(),
        image_size: int = 256,
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        amap_mode: Literal["add", "multiply"] = "add",
        sigma: float = 4.0,
        lr: float = 5e-3,
        select: Select = "last",
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, select, evaluator)
        self.layers = self.check_layers(layers)
        sizes = self._sizes(image_size)
        if len(sizes) != LEVELS or not _halving(sizes):
            raise ValueError(
                f"RD4AD needs three layers, each with half the resolution of the one before, and "
                f"the last with an even number of positions per side, 4 or more, but model.layers "
                f"{self.layers} of {self.backbone_settings.name} have {sizes} positions per side "
                f"at model.image_size {image_size}: change model.layers or model.image_size"
            )
        check_at_least("model.sigma", sigma, 0)
        check_above("model.lr", lr, 0)
        self.amap_mode = amap_mode
        self.sigma = sigma
        self.lr = lr
        channels = [self.backbone.channels[layer] for layer in self.layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # independent of random numbers used by the backbone
            self.bottleneck = OneClassBottleneck(channels, self.backbone_settings.name)
            self.student = Student(channels, self.backbone_settings.name)
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(
            {"backbone": asdict(self.backbone_settings), "layers": list(self.layers)}
        )

    def _sizes(self, image_size: int) -> list[int]:
        """Return the number of positions per side of each layer."""
        with torch.no_grad():
            features = self.backbone(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        return [int(features[layer].shape[-1]) for layer in self.layers]

    def features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of teacher and student, ``(B, C, h, w)`` per level."""
        features = self.backbone(images)
        teacher = [features[layer].to(self.dtype) for layer in self.layers]
        return teacher, self.student(self.bottleneck(teacher))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of normal images."""
        teacher, student = self.features(batch["image"])
        with torch.autocast(self.device.type, enabled=False):
            loss = reverse_distillation_loss(teacher, student)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, with a constant learning rate."""
        trained = [*self.bottleneck.parameters(), *self.student.parameters()]
        return torch.optim.Adam(trained, lr=self.lr, betas=(0.5, 0.999))

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` by the distance between teacher and student features."""
        self.check_trained()
        teacher, student = self.features(images)
        size = (images.shape[-2], images.shape[-1])
        with torch.autocast(self.device.type, enabled=False):
            maps = level_maps(teacher, student, size)
            joined = maps.sum(dim=1) if self.amap_mode == "add" else maps.prod(dim=1)
            joined = gaussian_blur(joined, self.sigma)
        return Scores(image_score=image_score(joined, "max"), anomaly_map=joined)


def reverse_distillation_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Return the cosine distance of teacher and student, summed over the levels.

    At each level, the distance is one minus the cosine between the flattened features of an image.
    It is averaged over the images.

    Args:
        teacher: Features of each level, ``(B, C, h, w)``.
        student: Features of the same shapes.
    """
    losses = [
        1 - F.cosine_similarity(a.float().flatten(1), b.float().flatten(1)).mean()
        for a, b in zip(teacher, student, strict=True)
    ]
    return torch.stack(losses).sum()


def level_maps(
    teacher: Sequence[Tensor], student: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """Return maps of one minus the cosine of teacher and student, ``(B, levels, H, W)``.

    Args:
        teacher: Features of each level, ``(B, C, h, w)``.
        student: Features of the same shapes.
        size: Height and width of the maps, in pixels.
    """
    distances = [
        1 - F.cosine_similarity(a.float(), b.float()) for a, b in zip(teacher, student, strict=True)
    ]
    return torch.stack(
        [resize_maps(distance, size, align_corners=True) for distance in distances], dim=1
    )


# -- the networks ----------------------------------------------------------------------------------


class MirrorSpec:
    """Types and numbers of the blocks that mirror a teacher.

    ResNets are mirrored by blocks of their own type, as in the public code, and any other CNN by
    two basic blocks per stage.
    """

    def __init__(self, name: str) -> None:
        self.deep = name in ("resnet50", "wide_resnet50_2")
        self.block = Bottleneck if self.deep else BasicBlock
        self.base_width = 128 if name.startswith("wide_") else 64
        self.squeeze_blocks = 3 if self.deep else 2
        self.blocks = (3, 4, 6) if self.deep or name == "resnet34" else (2, 2, 2)

    def make(self, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        """Return a block of ``outputs`` channels, with a convolution as shortcut if needed."""
        shortcut = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        planes = outputs // self.block.expansion
        block: nn.Module = self.block(
            inputs, planes, stride, downsample=shortcut, base_width=self.base_width
        )
        return block


class OneClassBottleneck(nn.Module):
    """Downsample three stages to the coarsest grid and compress them into one embedding.

    The embedding has half the height and width of that grid.

    Args:
        channels: Channels of the stages, finest first.
        name: Name of the teacher.
    """

    def __init__(self, channels: Sequence[int], name: str) -> None:
        super().__init__()
        first, second, third = channels
        spec = MirrorSpec(name)
        self.first = nn.Sequential(*_halved(first, second), *_halved(second, third))
        self.second = nn.Sequential(*_halved(second, third))
        blocks = [spec.make(3 * third, 2 * third, stride=2)]
        blocks += [spec.make(2 * third, 2 * third) for _ in range(spec.squeeze_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)
        _initialise(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the embedding of features ``(B, C, h, w)`` per stage, finest first.

        For ``(B, C, h, w)`` of the coarsest stage, the embedding is ``(B, 2 C, h / 2, w / 2)``.
        """
        first, second, third = features
        joined = torch.cat([self.first(first), self.second(second), third], dim=1)
        embedding: Tensor = self.blocks(joined)
        return embedding


class Student(nn.Module):
    """Mirrored teacher, which reconstructs the stages from the embedding, coarsest first.

    Args:
        channels: Channels of the stages, finest first.
        name: Name of the teacher.
    """

    def __init__(self, channels: Sequence[int], name: str) -> None:
        super().__init__()
        spec = MirrorSpec(name)
        stages, inputs = [], 2 * channels[-1]
        for outputs, blocks in zip(reversed(channels), spec.blocks, strict=True):
            up: nn.Module = (DeepUp if spec.deep else Up)(inputs, outputs, spec.base_width)
            stages.append(
                nn.Sequential(up, *(spec.make(outputs, outputs) for _ in range(blocks - 1)))
            )
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        _initialise(self)

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Return the reconstructed stages, finest first."""
        stages = []
        for stage in self.stages:
            embedding = stage(embedding)
            stages.append(embedding)
        return stages[::-1]


class Up(nn.Module):
    """A basic block that doubles height and width by transposed convolutions."""

    def __init__(self, inputs: int, outputs: int, base_width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *_doubled(inputs, outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(*_doubled(inputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Turn ``(B, C, h, w)`` into ``(B, C', 2 h, 2 w)``."""
        return F.relu(self.path(features) + self.shortcut(features))


class DeepUp(nn.Module):
    """A bottleneck block that doubles height and width by transposed convolutions."""

    def __init__(self, inputs: int, outputs: int, base_width: int) -> None:
        super().__init__()
        width = outputs // Bottleneck.expansion * base_width // 64
        self.path = nn.Sequential(
            conv1x1(inputs, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *_doubled(width, width),
            nn.ReLU(),
            conv1x1(width, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(*_doubled(inputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Turn ``(B, C, h, w)`` into ``(B, C', 2 h, 2 w)``."""
        return F.relu(self.path(features) + self.shortcut(features))


def _halving(sizes: Sequence[int]) -> bool:
    # With a last layer 2 wide, the embedding would have a single position. For a batch of a single
    # image, BatchNorm fails on it.
    return all(a == 2 * b for a, b in pairwise(sizes)) and sizes[-1] % 2 == 0 and sizes[-1] >= 4


def _halved(inputs: int, outputs: int) -> list[nn.Module]:
    return [conv3x3(inputs, outputs, stride=2), nn.BatchNorm2d(outputs), nn.ReLU()]


def _doubled(inputs: int, outputs: int) -> list[nn.Module]:
    up = nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2, bias=False)
    return [up, nn.BatchNorm2d(outputs)]


def _initialise(network: nn.Module) -> None:
    """Initialise convolutions as the public code does; transposed ones keep torch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
