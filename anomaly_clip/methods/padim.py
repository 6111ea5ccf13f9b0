"""PaDiM (arXiv 2011.08785): a Gaussian of normal features at every position.

Features of three stages of a frozen CNN are upsampled to the finest grid, and a random subset of
their channels is kept. The anomaly score is the Mahalanobis distance. Settings and conventions are
those of the public code behind most published results with ResNet-18; see docs/methods/padim.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, BackboneSettings
from anomaly_clip.constant_tensors import cached_tensor
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.feature_method import FittedMethod, feature_sums
from anomaly_clip.methods.gaussians import RunningMoments, inverse_factor, merged_moments
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["PaDiM", "choose_channels"]


class PaDiM(FittedMethod):
    """One Gaussian per position (PaDiM, arXiv 2011.08785).

    Args:
        backbone: A CNN or a ViT or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model.
        image_size: Side of the square input images, in pixels.
        layers: Layers whose features are concatenated, finest first: names of a CNN's, or 1-based
            numbers of blocks, of which layer1 to layer4 are the last ones of the four quarters.
        num_channels: Number of channels kept, or null for all. The default keeps 100 of the 448
            channels that the layers of ResNet-18 have.
        channel_seed: Seed of the random choice of channels. The default chooses the same channels
            as the public code.
        regularization: Value added to the diagonal of every covariance.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        blur_border: Padding of the map before the blur. edge: reflection that repeats the edge
            pixel (SciPy, as published); inner: reflection that does not (anomalib).
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    fitted_buffers: ClassVar[tuple[str, ...]] = ("mean", "factor")
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "sigma", "blur_border"})
    mean: Tensor
    """``(N, C)`` after the fit."""
    factor: Tensor
    """``(N, C, C)`` after the fit: the matrices ``F`` of :func:`inverse_factor`."""
    channels: Tensor
    """``(C,)``, in the order of sampling, counted over all layers."""
    within: Tensor
    """``(C,)``, the same sorted by layer, each counted from the first channel of its layer."""

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = BackboneSettings(),
        image_size: int = 224,
        layers: Sequence[int] | Sequence[str] = ("layer1", "layer2", "layer3"),
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
                f"model.num_channels must be between 1 and {total}, the number of channels of "
                f"{', '.join(map(str, self.layers))}, got {num_channels}"
            )
        check_above("model.regularization", regularization, 0)
        check_at_least("model.sigma", sigma, 0)
        self.regularization = regularization
        self.sigma = sigma
        self.blur_border = blur_border
        chosen = choose_channels(total, num_channels, channel_seed)
        self.register_buffer("channels", torch.tensor(chosen))
        # Follows from the channels, so that no checkpoint has it.
        self.register_buffer("within", torch.empty(0, dtype=torch.int64), persistent=False)
        self._arrange()
        self.register_load_state_dict_post_hook(_arrange_loaded)
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))
        self._moments = RunningMoments()

    def on_fit_start(self) -> None:
        """Start from empty statistics."""
        self._moments = RunningMoments()

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch of normal images to the statistics; return sums of features."""
        features = self.embed(batch["image"])
        self._moments.add(features)
        return {"features": feature_sums(features)}

    def on_train_epoch_end(self) -> None:
        """Compute the Gaussians from the statistics of all processes.

        Raises:
            ValueError: If there are fewer than two training images.
        """
        moments = merged_moments(self._moments.take(), self.trainer)
        if moments.num_images < 2:
            advice = "add images" if self.data is None else self.data.more_training_images()
            raise ValueError(
                f"PaDiM needs at least 2 normal training images to compute a covariance, got "
                f"{moments.num_images}: {advice}"
            )
        factor = inverse_factor(moments.scatter, moments.num_images, self.regularization)
        self.keep(mean=moments.mean, factor=factor)

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` by the distance of each position from its Gaussian."""
        self.check_fitted()
        with self.backbone.out_of_autocast():  # distances stay in float32
            distances = self.distances(self.embed(images))
            size = (images.shape[-2], images.shape[-1])
            maps = patches_to_map(distances, size)
            maps = gaussian_blur(maps, self.sigma, border=self.blur_border)
        return Scores(image_score=image_score(maps, "max"), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return the selected channels at every position of the finest layer, ``(B, N, C)``.

        Coarse layers are upsampled to the nearest position. As this and the choice of channels only
        copy values, a single gather does both.
        """
        features = self.backbone.feature_maps(images, self.layers)
        grids = tuple((maps.shape[-2], maps.shape[-1]) for maps in features)
        channels = self.within.split(self._counts)
        chosen = [maps[:, within] for maps, within in zip(features, channels, strict=True)]
        values = torch.cat([maps.flatten(2).mT.flatten(1) for maps in chosen], dim=1)
        places = _places(tuple(self._counts), self._order, grids, str(values.device))
        return values.index_select(1, places).unflatten(1, (-1, len(self._order)))  # (B, N, C)

    def _arrange(self) -> None:
        """Sort the channels by layer, once, as a graph does not know their values."""
        start, within, places = 0, [], []
        self._counts = []
        """Number of channels of each layer."""
        for layer in self.layers:
            end = start + self.backbone.channels[layer]
            places.append(((self.channels >= start) & (self.channels < end)).nonzero()[:, 0])
            within.append(self.channels[places[-1]] - start)
            self._counts.append(len(places[-1]))
            start = end
        self.within = torch.cat(within)
        self._order = tuple(torch.cat(places).argsort().tolist())
        """Places of the channels in ``within``."""

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances ``(B, N)`` of features ``(B, N, C)``."""
        difference = (features.to(self.mean.dtype) - self.mean).transpose(0, 1)  # (N, B, C)
        return torch.linalg.vector_norm(difference @ self.factor.mT, dim=-1).T  # (B, N)


@cached_tensor(maxsize=8)
def _places(
    counts: tuple[int, ...],
    order: tuple[int, ...],
    grids: tuple[tuple[int, int], ...],
    device: str,
) -> Tensor:
    """Return the place ``(N * C,)`` of each position's and channel's value, row by row.

    The values are those of all layers one after the other, each ``(h * w, c)``.

    Args:
        counts: Number ``c`` of channels of each layer.
        order: Channels to return, counted over all layers.
        grids: Height and width of each layer, the finest first.
        device: Device of the result.
    """
    start, columns = 0, []
    for count, (height, width) in zip(counts, grids, strict=True):
        cells = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
        cells = F.interpolate(cells, grids[0], mode="nearest").flatten().int()  # (N,)
        columns.append(start + cells[:, None] * count + torch.arange(count, dtype=torch.int32))
        start += height * width * count
    return torch.cat(columns, dim=1)[:, list(order)].flatten().to(device)


def _arrange_loaded(method: PaDiM, keys: object) -> None:
    method._arrange()


def choose_channels(total: int, count: int | None, seed: int) -> list[int]:
    """Return a random choice of channels, in the order of sampling.

    The public code chooses the same channels for the same seed: it also calls Python's
    ``random.sample``, whose results have not changed since.

    Example:
        >>> from anomaly_clip.methods.padim import choose_channels
        >>> choose_channels(448, 100, 1024)[:4]
        [408, 9, 247, 435]
    """
    if count is None:
        return list(range(total))
    return random.Random(seed).sample(range(total), count)  # noqa: S311 - no secret
