"""CUDA graphs of a frozen backbone: all kernels of a forward pass in a single launch.

A forward pass of a ViT starts some 300 kernels. For a few images, to start them takes longer than
to run them. A CUDA graph records them once and starts them together. It always computes with the
same memory, so it may only record functions that depend on nothing but the images, weights that do
not change, and the settings in its key. That is why it belongs to the frozen backbones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from anomaly_clip.constant_tensors import has_values
from anomaly_clip.progress import say

__all__ = ["Replays"]

T = TypeVar("T")
Run = Callable[[Tensor], Any]

MOST_PIXELS = 1 << 21
"""Pixels of a batch, 36 images of 240 px, up to which recordings are made. Beyond, a device takes
longer to run the kernels than the CPU to start them, and recordings would take much memory."""
MOST_KEPT = 4
"""Number of recordings that are kept; the one not used for the longest time is dropped first."""


class Replays:
    """Recordings of functions of images, one for each function and shape of the batch.

    A recording is made when a function is called with the same settings and shape for the second
    time, without gradients. The results are copies, which later calls do not change.

    Args:
        record: Function that records a function of images; see :func:`record_on_cuda`.
    """

    enabled: bool = True
    """False: nothing is recorded or replayed."""

    def __init__(self, record: Callable[[Run, Tensor, Any], tuple[Run, Any]] | None = None) -> None:
        self._record = record or record_on_cuda
        self._lock = threading.RLock()  # recordings compute with the same memory for all threads
        self.clear()

    def clear(self) -> None:
        """Drop all recordings: weights have moved, or have another dtype."""
        self._runs: OrderedDict[Hashable, Run | None] = OrderedDict()
        self._pool: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        """Return an empty copy: recordings are of the weights of the original."""
        return Replays(self._record)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: recordings exist in one process."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without recordings."""
        self.__init__()  # type: ignore[misc]

    def __call__(
        self,
        function: Callable[[Tensor], T],
        key: Hashable,
        images: Tensor,
        passes: float = 1.0,
        reads: Sequence[Tensor] = (),
    ) -> T:
        """Return ``function(images)``, from a recording if that is faster and possible.

        Args:
            function: Function that only depends on its argument, on frozen weights and on the key.
                It returns tensors in tuples, lists or dictionaries.
            key: Name of the function and all its settings.
            images: ``(B, 3, H, W)``.
            passes: How often the function computes each patch of an image.
            reads: Other tensors that the function reads; a recording is of these only.
        """
        if not (self.enabled and may_replay(images, passes)):
            return function(images)
        addresses = tuple(tensor.data_ptr() for tensor in reads)
        key = key, addresses, images.shape, images.dtype, images.device, _state_of_torch()
        with self._lock:
            run = function
            if key in self._runs:  # not the first call, which loads libraries and fills caches
                run = self._runs[key] or self._recorded(function, images)
            self._keep(key, None if run is function else run)
            return run(images)

    def _keep(self, key: Hashable, run: Run | None) -> None:
        self._runs[key] = run
        self._runs.move_to_end(key)
        while len(self._runs) > MOST_KEPT:
            self._runs.popitem(last=False)

    def _recorded(self, function: Run, images: Tensor) -> Run:
        try:
            run, self._pool = self._record(function, images, self._pool)
        except RuntimeError as error:  # a layer waits for the device, which cannot be recorded
            first = str(error).strip().partition("\n")[0]
            say(f"the backbone cannot be recorded as a CUDA graph, so it runs without ({first})")
            self.enabled = False
            return function
        return run


def may_replay(images: Tensor, passes: float = 1.0) -> bool:
    """Return whether a batch is one of few images on a CUDA device, outside of any tracing."""
    return (
        images.device.type == "cuda"
        and not torch.is_grad_enabled()
        and images[:, 0].numel() * passes <= MOST_PIXELS
        and has_values(images)
        and not torch.compiler.is_compiling()
        and torch.cuda.current_stream(images.device) == torch.cuda.default_stream(images.device)
        and not torch.cuda.is_current_stream_capturing()
    )


def record_on_cuda(function: Run, images: Tensor, pool: Any) -> tuple[Run, Any]:
    """Record a function as a CUDA graph.

    Args:
        function: See :class:`Replays`.
        images: Images of the shape, dtype and device of later calls.
        pool: Memory that graphs of one backbone share, as only one of them runs at a time; None
            for the first one.

    Returns:
        The function that replays the graph, and the memory pool.
    """
    with torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
        given = images.clone()
        # Once more on another stream, as torch advises: libraries prepare themselves per stream.
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            function(given)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that load data may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function(given)

    def run(images: Tensor) -> Any:  # does not keep the function, which refers to the backbone
        given.copy_(images)
        graph.replay()
        return apply_to_collection(results, Tensor, torch.clone)

    return run, graph.pool()


def _state_of_torch() -> tuple[Any, ...]:
    """Return the global settings that decide which kernels run."""
    backends: Any = torch.backends
    precision: tuple[Any, ...]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # the older getters fail if these are used
        precision = (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
    else:  # torch before 2.9
        precision = (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32)
    return (
        *precision,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
