"""Checks of what is given to ``score``: images as a batch, and a category for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from anomaly_clip.records import Scores

if TYPE_CHECKING:
    from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["check_categories", "check_images", "checked_score"]

Method = TypeVar("Method", bound="AnomalyMethod")
Score = Callable[[Method, Tensor, list[str]], Scores]


def checked_score(score: Score[Method]) -> Score[Method]:
    """Return a method's ``score`` with checks of its arguments."""

    @wraps(score)
    def checked(self: Method, images: Tensor, categories: list[str]) -> Scores:
        if torch.compiler.is_compiling():  # the number of images is unknown
            return score(self, images, categories)
        check_images(images)
        check_categories(categories, len(images))
        if images.is_floating_point():
            self.backbone.check_normalised(images)
        return score(self, images, categories)

    return checked


def check_images(images: Tensor) -> None:
    """Check that images are a batch of RGB images, ``(B, 3, H, W)``, uint8 or floating point.

    Raises:
        ValueError: If they are not; the message tells how to convert them.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"score: expected images as a tensor (B, 3, H, W), got {type(images).__name__}: "
            f"convert them, such as torch.from_numpy(array).permute(2, 0, 1)[None] for one array"
        )
    shape = tuple(images.shape)
    problem = f"score: expected images (B, 3, H, W), got {shape}"
    if images.ndim == 3:
        last = "image.permute(2, 0, 1)[None]" if shape[0] != 3 and shape[2] == 3 else "image[None]"
        raise ValueError(f"{problem}: for a single image, give {last}")
    if images.ndim != 4 or shape[1] != 3:
        channels_last = images.ndim == 4 and shape[3] == 3
        way_out = "give images.permute(0, 3, 1, 2)" if channels_last else "give RGB images"
        raise ValueError(f"{problem}: {way_out}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(
            f"score: expected uint8 images, or floating-point ones that are already normalised, "
            f"got {images.dtype}: convert them to uint8, with values from 0 to 255"
        )


def check_categories(categories: Sequence[str], count: int) -> None:
    """Check that there is one category per image.

    Raises:
        ValueError: If there is not; the message tells how to write them.
    """
    problem = f"score: expected a list with the categories of {count} images"
    if isinstance(categories, str):
        raise ValueError(f"{problem}, got {categories!r}: write [{categories!r}] * {count}")
    if not isinstance(categories, Sequence) or not all(isinstance(c, str) for c in categories):
        raise ValueError(f"{problem}, got {categories!r}: write a list of texts")
    if len(categories) != count:
        raise ValueError(f"{problem}, got {len(categories)}: give one category per image")
