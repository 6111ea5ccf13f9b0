"""PaDiM (arXiv 2011.08785): at every position a Gaussian of what normal images look like there.

Features of three stages of a frozen CNN, brought to one grid, a random choice of their channels; an
image's distance is Mahalanobis's. Settings and conventions are those of the public code that most
published figures with ResNet-18 come from (section 1 of the specification).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.cnn_method import FittedMethod
from anomaly_clip.methods.gaussians import Moments, RunningMoments, inverse_factor
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["PaDiM", "choose_channels"]


class PaDiM(FittedMethod):
    """A Gaussian a position (PaDiM, section 1 of the specification).

    Args:
        backbone: Which CNN; the layers below are taken of it, unless it names others.
        image_size: Side of its images, in pixels.
        layers: Whose features are joined, finest first.
        num_channels: How many of all channels are used, null for all (ResNet-18: 100 of 448).
        channel_seed: Draws them, as the public code does.
        regularization: Added to the diagonal of every covariance.
        sigma: Gaussian blur of the map, in pixels.
        blur_border: edge: the border is reflected with its edge (SciPy's, as published); inner:
            without (anomalib's).
        evaluator: How figures are computed.
    """

    fitted_buffers: ClassVar[tuple[str, ...]] = ("mean", "factor")
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "sigma", "blur_border"})
    mean: Tensor
    """``(N, C)`` once fitted."""
    factor: Tensor
    """``(N, C, C)``; the length of its product with a difference to the mean is the distance."""
    channels: Tensor

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone = CNNSettings(),
        image_size: int = 224,
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        num_channels: int | None = 100,
        channel_seed: int = 1024,
        regularization: float = 0.01,
        sigma: float = 4.0,
        blur_border: Literal["edge", "inner"] = "edge",
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, evaluator)
        self.layers = self.check_layers(layers)
        total = sum(self.backbone.channels[layer] for layer in self.layers)
        if num_channels is not None and not 1 <= num_channels <= total:
            raise ValueError(
                f"model.num_channels must be between 1 and the {total} of {', '.join(self.layers)},"
                f" got {num_channels}"
            )
        check_above("model.regularization", regularization, 0)
        check_at_least("model.sigma", sigma, 0)
        self.regularization = regularization
        self.sigma = sigma
        self.blur_border = blur_border
        chosen = choose_channels(total, num_channels, channel_seed)
        self.register_buffer("channels", torch.tensor(chosen))
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(
            {"backbone": asdict(self.asked_backbone), "layers": list(self.layers)}
        )
        self._moments = RunningMoments()

    def on_fit_start(self) -> None:
        """Begin anew."""
        self._moments = RunningMoments()

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch of normal images."""
        self._moments.add(self.embed(batch["image"]))

    def on_train_epoch_end(self) -> None:
        """Turn the moments of all processes into Gaussians.

        Raises:
            ValueError: If there are fewer than two images.
        """
        moments = self.merged(self._moments.take())
        if moments.num_images < 2:
            raise ValueError(
                "PaDiM needs at least 2 normal training images: of a single one there is no spread"
            )
        factor = inverse_factor(moments.scatter, moments.num_images, self.regularization)
        self.keep(mean=moments.mean, factor=factor)

    def merged(self, local: Moments) -> Moments:
        """Return the moments over all processes."""
        strategy = self.trainer.strategy
        if self.trainer.world_size == 1:
            return local
        count = strategy.reduce(
            torch.tensor(float(local.num_images), device=self.device), reduce_op="sum"
        )
        total = strategy.reduce(local.num_images * local.mean, reduce_op="sum")
        mean = total / count
        apart = local.mean - mean
        scatter = local.scatter + local.num_images * apart.unsqueeze(2) * apart.unsqueeze(1)
        return Moments(int(count), mean, strategy.reduce(scatter, reduce_op="sum"))

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)``: the distance of each position from its Gaussian."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            distances = self.distances(self.embed(images))
            size = (images.shape[-2], images.shape[-1])
            maps = patches_to_map(distances, size)
            maps = gaussian_blur(maps, self.sigma, border=self.blur_border)
        return Scores(image_score=image_score(maps, "max"), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the chosen channels at every position of the finest layer, ``(B, N, C)``.

        Channels are chosen before coarse layers are enlarged: it is the same, and less work.
        """
        features = self.backbone(images)
        size = features[self.layers[0]].shape[-2:]
        parts, places, start = [], [], 0
        for layer in self.layers:
            maps = features[layer]
            within = (self.channels >= start) & (self.channels < start + maps.shape[1])
            if within.any():
                chosen = maps[:, self.channels[within] - start]
                if chosen.shape[-2:] != size:
                    chosen = F.interpolate(chosen, size, mode="nearest")
                parts.append(chosen)
                places.append(within.nonzero()[:, 0])
            start += maps.shape[1]
        order = torch.cat(places).argsort()
        return torch.cat(parts, dim=1).flatten(2)[:, order].mT  # (B, N, C)

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances ``(B, N)`` of features ``(B, N, C)``."""
        apart = (features.to(self.mean.dtype) - self.mean).transpose(0, 1)  # (N, B, C)
        return torch.linalg.vector_norm(apart @ self.factor.mT, dim=-1).T  # (B, N)


def choose_channels(total: int, count: int | None, seed: int) -> list[int]:
    """Return a random choice of channels, in the order in which it was drawn.

    It is that of the public code: Python's own generator, which has not changed since.

    Example:
        >>> from anomaly_clip.methods.padim import choose_channels
        >>> choose_channels(448, 100, 1024)[:4]
        [408, 9, 247, 435]
    """
    if count is None:
        return list(range(total))
    return random.Random(seed).sample(range(total), count)
