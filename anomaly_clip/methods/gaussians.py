"""Mean and covariance of features at every position, of any number of images in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anomaly_clip.progress import track

__all__ = [
    "FewSampleGaussians",
    "Moments",
    "RunningMoments",
    "few_sample_gaussians",
    "inverse_factor",
]

AT_ONCE = 64
"""Images between two updates: each goes once through all covariances, which fit no cache."""
POSITIONS = {"cpu": 16}
"""Covariances worked on at once: on a CPU as many as fit its cache."""
FACTORED_AT_ONCE = 256
"""Covariances factored at once on other devices, so that memory stays bounded."""


class Moments(NamedTuple):
    """What is known of features, in float64."""

    num_images: int
    mean: Tensor
    """``(N, C)``."""
    scatter: Tensor
    """``(N, C, C)``, sum of the outer products of the differences to the mean."""


class RunningMoments:
    """Add up features batch by batch.

    Sums are of differences to the mean of the first images, in float64: where means are large, sums
    of squares lose digits.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._waiting: list[Tensor] = []
        self._shift = self._sum = self._products = torch.empty(0)

    def add(self, features: Tensor) -> None:
        """Take the features ``(B, N, C)`` of some images."""
        self._waiting.append(features)
        if sum(len(part) for part in self._waiting) >= AT_ONCE:
            self._update()

    def take(self) -> Moments:
        """Return the moments of all that was added, and forget it.

        Raises:
            ValueError: If nothing was.
        """
        self._update()
        count = self.num_images
        if count == 0:
            raise ValueError("there are no features to take moments of")
        apart = self._sum / count
        scatter = self._products
        scatter.baddbmm_(apart.unsqueeze(2), apart.unsqueeze(1), alpha=-count)
        moments = Moments(count, self._shift + apart, scatter)
        self.__init__()  # type: ignore[misc]
        return moments

    def _update(self) -> None:
        if not self._waiting:
            return
        waiting = self._waiting
        if waiting[0].device.type == "mps":  # which has no float64
            waiting = [part.cpu() for part in waiting]
        device, positions = waiting[0].device, waiting[0].shape[1]
        if self.num_images == 0:
            self._shift = waiting[0].mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._shift)
            shape = (*self._shift.shape, self._shift.shape[-1])
            self._products = torch.zeros(shape, dtype=torch.float64, device=device)
        step = POSITIONS.get(device.type, positions)
        for start in range(0, positions, step):
            some = slice(start, start + step)
            features = torch.cat([part[:, some] for part in waiting])
            centred = features.double().sub_(self._shift[some]).transpose(0, 1)  # (P, B, C)
            self._sum[some] += centred.sum(dim=1)
            self._products[some].baddbmm_(centred.mT, centred)
        self.num_images += sum(len(part) for part in waiting)
        self._waiting = []


def inverse_factor(scatter: Tensor, num_images: int, regularization: float) -> Tensor:
    """Return matrices ``F`` ``(N, C, C)``: the length of ``F x`` is the Mahalanobis distance of x.

    ``F`` is the inverse of the lower Cholesky factor of the unbiased covariance plus a multiple of
    the identity.

    Args:
        scatter: ``(N, C, C)``, see :class:`Moments`; the result takes its place.
        num_images: How many images, 2 or more.
        regularization: What is added to the diagonal.

    Raises:
        ValueError: If a covariance is singular, rounding included.
    """
    identity = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    step = POSITIONS.get(scatter.device.type, FACTORED_AT_ONCE)
    for start in track(range(0, len(scatter), step), "inverting covariances"):
        part = scatter[start : start + step] / (num_images - 1) + regularization * identity
        lower, failed = torch.linalg.cholesky_ex(part)
        if failed.any():
            raise ValueError(
                f"model.regularization {regularization:g} is too small: a covariance of "
                f"{num_images} images is singular"
            )
        scatter[start : start + step] = torch.linalg.solve_triangular(
            lower, identity.expand_as(lower), upper=False
        )
    return scatter


class FewSampleGaussians(NamedTuple):
    """Gaussians of a few samples in many channels, without their covariances.

    With the samples' differences to the mean as rows of X, the covariance is X'X / (n - 1) plus a
    multiple r of the identity. The Mahalanobis distance is then what it takes to explain a
    difference x by a mix of samples and a rest: its square is the minimum over c of
    |x - X'c|^2 / r + (n - 1) |c|^2. Both terms are positive, so nothing cancels, and in a minimum
    small errors of c count for nothing: single precision is enough.
    """

    mean: Tensor
    """``(N, C)``."""
    samples: Tensor
    """``(N, n, C)``, their differences to the mean: X."""
    mixing: Tensor
    """``(N, n, n)``, symmetric; times the products with the samples it gives the best mix c."""
    regularization: float

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances ``(B, N)`` of features ``(B, N, C)``."""
        parts = []
        for start in range(0, len(self.mean), FACTORED_AT_ONCE):
            some = slice(start, start + FACTORED_AT_ONCE)
            samples = self.samples[some]
            apart = features[:, some].to(self.mean.dtype) - self.mean[some]
            apart = apart.transpose(0, 1)  # (P, B, C)
            mix = apart @ samples.mT @ self.mixing[some]  # (P, B, n)
            rest = (apart - mix @ samples).square().sum(dim=-1) / self.regularization
            used = (samples.shape[1] - 1) * mix.square().sum(dim=-1)
            parts.append((rest + used).sqrt())
        return torch.cat(parts).T  # (B, N)


def few_sample_gaussians(
    features: Callable[[Tensor], Tensor], num_positions: int, regularization: float
) -> FewSampleGaussians:
    """Return a Gaussian a position, computed in float64, some positions at a time.

    Args:
        features: Returns the features ``(n, P, C)`` of all samples, 2 or more, at ``P`` positions.
        num_positions: How many there are in all.
        regularization: Added to the diagonal of the unbiased covariances.
    """
    parts = [
        _few_samples(features(some), regularization)
        for some in torch.arange(num_positions).split(FACTORED_AT_ONCE)
    ]
    mean, samples, mixing = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return FewSampleGaussians(mean, samples, mixing, regularization)


def _few_samples(features: Tensor, regularization: float) -> tuple[Tensor, ...]:
    """Return mean, samples and mixing for features ``(n, P, C)``, in float32 at least."""
    kind, device = torch.promote_types(features.dtype, torch.float32), features.device
    if device.type == "mps":  # which has no float64
        features = features.cpu()
    samples = features.double().transpose(0, 1)  # (P, n, C)
    mean = samples.mean(dim=1, keepdim=True)
    samples = samples - mean
    count = samples.shape[1]
    products = samples @ samples.mT  # (P, n, n)
    products.diagonal(dim1=1, dim2=2).add_((count - 1) * regularization)
    lower, failed = torch.linalg.cholesky_ex(products)
    if failed.any():
        raise ValueError(
            f"model.regularization {regularization:g} is too small: a covariance of {count} "
            f"images is singular"
        )
    mixing = torch.cholesky_inverse(lower)
    return tuple(tensor.to(device, kind) for tensor in (mean[:, 0], samples, mixing))
