"""Constant tensors, computed once: from plain values, for eager code and for graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

__all__ = ["cached_tensor", "has_values"]

P = ParamSpec("P")


def cached_tensor(maxsize: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Return a decorator that caches the tensor that a function computes from plain values.

    A cached tensor is computed on the CPU and works with and without gradients and inference mode,
    whatever the first call was in. A function that takes a device moves the tensor there itself: a
    copy at each call would make the CPU wait for a GPU. Nothing is cached of a graph that is being
    traced, and nothing without values, such as the fake tensors of ``torch.export``: a later call
    would get them.

    Args:
        maxsize: Number of tensors that are kept.

    Example:
        >>> import torch
        >>> from anomaly_clip.constant_tensors import cached_tensor
        >>> ramp = cached_tensor(maxsize=4)(lambda size: torch.arange(size))
        >>> ramp(3) is ramp(3)
        True
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def compute(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)

        kept = lru_cache(maxsize)(compute)

        @wraps(function)
        def cached(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if torch.compiler.is_compiling() or not has_values(torch.empty(0)):
                return function(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        return cached

    return decorate


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values, unlike the fake ones of ``torch.export``.

    Only such tensors may be kept for later calls.
    """
    return type(tensor) is Tensor
