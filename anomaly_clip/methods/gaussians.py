"""Mean and covariance of features at every position, for any number of images in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anomaly_clip.errors import Diverged
from anomaly_clip.progress import track

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "FewSampleGaussians",
    "Moments",
    "RunningMoments",
    "few_sample_gaussians",
    "inverse_factor",
    "merged_moments",
]

AT_ONCE = 64
"""Images per update. Each update rewrites all covariances, which are too large for a cache."""
POSITIONS = {"cpu": 16}
"""Covariances processed at once, by device type. On a CPU, they should fit in the cache."""
FACTORED_AT_ONCE = 256
"""Gaussians computed at once on other devices, or from a few samples, to bound the memory."""


class Moments(NamedTuple):
    """Mean and scatter of features, in float64."""

    num_images: int
    mean: Tensor
    """``(N, C)``."""
    scatter: Tensor
    """``(N, C, C)``, sum of the outer products of the differences from the mean."""


class RunningMoments:
    """Accumulate the mean and scatter of features batch by batch.

    All sums are in float64. The mean of the first images is subtracted from all features, because
    sums of squares of features with a large mean lose digits.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._num_waiting = 0
        self._waiting = torch.empty(0)
        """``(n, N, C)``. One tensor for all updates: parts of the memory between others, which
        live shorter, would make a long fit take more of it."""
        self._shift = self._sum = self._products = torch.empty(0)

    def add(self, features: Tensor) -> None:
        """Add the features ``(B, N, C)`` of a batch of images."""
        if self._num_waiting + len(features) > len(self._waiting):
            self._update()
        if len(features) >= AT_ONCE:
            self._include(features)
            return
        if not len(self._waiting):
            self._waiting = features.new_empty(AT_ONCE, *features.shape[1:])
        self._waiting[self._num_waiting : self._num_waiting + len(features)] = features
        self._num_waiting += len(features)

    def take(self) -> Moments:
        """Return the mean and scatter of all features added, and reset the sums.

        Raises:
            ValueError: If no features were added.
        """
        self._update()
        count = self.num_images
        if count == 0:
            raise ValueError(
                f"mean and covariance need the features of at least 1 image, got {count}: call "
                f"add first"
            )
        difference = self._sum / count
        scatter = self._products
        scatter.baddbmm_(difference.unsqueeze(2), difference.unsqueeze(1), alpha=-count)
        moments = Moments(count, self._shift + difference, scatter)
        self.__init__()  # type: ignore[misc]
        return moments

    def _update(self) -> None:
        if self._num_waiting:
            self._include(self._waiting[: self._num_waiting])
            self._num_waiting = 0

    def _include(self, features: Tensor) -> None:
        if features.device.type == "mps":  # MPS has no float64
            features = features.cpu()
        device, positions = features.device, features.shape[1]
        if self.num_images == 0:
            self._shift = features.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._shift)
            shape = (*self._shift.shape, self._shift.shape[-1])
            self._products = torch.zeros(shape, dtype=torch.float64, device=device)
        step = POSITIONS.get(device.type, positions)
        for start in range(0, positions, step):
            chunk = slice(start, start + step)
            centred = (features[:, chunk] - self._shift[chunk]).transpose(0, 1)  # (P, B, C)
            self._sum[chunk] += centred.sum(dim=1)
            self._products[chunk].baddbmm_(centred.mT, centred)
        self.num_images += len(features)


def merged_moments(local: Moments, trainer: Trainer) -> Moments:
    """Return the mean and scatter of the features of all processes.

    Args:
        local: Those of this process.
        trainer: The trainer of the fit.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1:
        return local
    number = torch.tensor(float(local.num_images), device=strategy.root_device)
    count = strategy.reduce(number, reduce_op="sum")
    total = strategy.reduce(local.num_images * local.mean, reduce_op="sum")
    mean = total / count
    shift = local.mean - mean
    scatter = local.scatter + local.num_images * shift.unsqueeze(2) * shift.unsqueeze(1)
    return Moments(int(count), mean, strategy.reduce(scatter, reduce_op="sum"))


def inverse_factor(scatter: Tensor, num_images: int, regularization: float) -> Tensor:
    """Return matrices ``F`` ``(N, C, C)`` such that the norm of ``F x`` is a Mahalanobis distance.

    Here ``x`` is the difference of a feature from the mean, and ``F`` is the inverse of the lower
    Cholesky factor of the regularised covariance. The latter is the unbiased covariance plus a
    multiple of the identity.

    Args:
        scatter: ``(N, C, C)``, see :class:`Moments`; overwritten by the result.
        num_images: Number of images, 2 or more.
        regularization: Value added to the diagonal.

    Raises:
        ValueError: If a covariance is numerically singular.
        Diverged: If a value is NaN or infinite.
    """
    identity = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    step = POSITIONS.get(scatter.device.type, FACTORED_AT_ONCE)
    for start in track(range(0, len(scatter), step), "inverting covariances"):
        part = scatter[start : start + step].div_(num_images - 1)
        part.diagonal(dim1=1, dim2=2).add_(regularization)
        lower, failed = torch.linalg.cholesky_ex(part)
        if failed.any():
            raise _no_factor(part, num_images, regularization)
        part.copy_(torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False))
    return scatter


class FewSampleGaussians(NamedTuple):
    """Gaussians of a few samples in many channels, without explicit covariances.

    The rows of X are the differences of n samples from their mean. The covariance is
    X'X / (n - 1) + r I, where r is the regularization. Let x be the difference of a feature from
    the mean. Its squared Mahalanobis distance is the minimum over c of
    |x - X'c|^2 / r + (n - 1) |c|^2: the cost of approximating x by a linear combination of the
    samples with coefficients c. Single precision is enough: both terms are positive, so nothing
    cancels, and at a minimum small errors of c have no first-order effect.
    """

    mean: Tensor
    """``(N, C)``."""
    samples: Tensor
    """``(N, n, C)``, the matrices X."""
    mixing: Tensor
    """``(N, n, n)``, symmetric matrices A: the minimum is at c = A X x."""
    regularization: float

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances ``(B, N)`` of features ``(B, N, C)``."""
        parts = []
        for start in range(0, len(self.mean), FACTORED_AT_ONCE):
            chunk = slice(start, start + FACTORED_AT_ONCE)
            samples = self.samples[chunk]
            difference = features[:, chunk].to(self.mean.dtype) - self.mean[chunk]
            difference = difference.transpose(0, 1)  # (P, B, C)
            mix = difference @ samples.mT @ self.mixing[chunk]  # (P, B, n)
            residual = (difference - mix @ samples).square().sum(dim=-1) / self.regularization
            penalty = (samples.shape[1] - 1) * mix.square().sum(dim=-1)
            parts.append((residual + penalty).sqrt())
        return torch.cat(parts).T  # (B, N)


def few_sample_gaussians(
    features: Callable[[Tensor], Tensor], num_positions: int, regularization: float
) -> FewSampleGaussians:
    """Return one Gaussian per position, computed in float64 for a few positions at a time.

    Args:
        features: Function that takes the indices of ``P`` positions and returns the features
            ``(n, P, C)`` of all n samples at these positions; n is 2 or more.
        num_positions: Total number of positions.
        regularization: Value added to the diagonal of the unbiased covariances.
    """
    parts = [
        _few_samples(features(chunk), regularization)
        for chunk in torch.arange(num_positions).split(FACTORED_AT_ONCE)
    ]
    mean, samples, mixing = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return FewSampleGaussians(mean, samples, mixing, regularization)


def _few_samples(features: Tensor, regularization: float) -> tuple[Tensor, ...]:
    """Return mean, samples and mixing of :class:`FewSampleGaussians`, in float32 or wider.

    Args:
        features: ``(n, P, C)``.
        regularization: Value added to the diagonal of the unbiased covariances.
    """
    dtype, device = torch.promote_types(features.dtype, torch.float32), features.device
    if device.type == "mps":  # MPS has no float64
        features = features.cpu()
    samples = features.double().transpose(0, 1)  # (P, n, C)
    mean = samples.mean(dim=1, keepdim=True)
    samples = samples - mean
    count = samples.shape[1]
    products = samples @ samples.mT  # (P, n, n)
    products.diagonal(dim1=1, dim2=2).add_((count - 1) * regularization)
    lower, failed = torch.linalg.cholesky_ex(products)
    if failed.any():
        raise _no_factor(products, count, regularization)
    mixing = torch.cholesky_inverse(lower)
    return tuple(tensor.to(device, dtype) for tensor in (mean[:, 0], samples, mixing))


def _no_factor(covariances: Tensor, num_images: int, regularization: float) -> ValueError:
    """Return the error for covariances that have no Cholesky factor."""
    if not covariances.isfinite().all():
        return Diverged(
            f"the features of {num_images} images contain NaN or infinite values: give other "
            f"backbone weights, or set trainer.precision 32-true"
        )
    return ValueError(
        f"model.regularization {regularization:g} is too small: the covariance of features of "
        f"{num_images} images is singular; give a larger value"
    )
