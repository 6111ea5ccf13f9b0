"""Device, sizes, clock and inputs of ``gpu.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.records import DEMO, EVALUATED, Batch

__all__ = [
    "B_16",
    "FULL",
    "L_14",
    "PRECISIONS",
    "TINY",
    "Lab",
    "Sizes",
    "dtype_of",
    "host_batches",
    "matrix_precision",
    "mixed",
    "noise",
    "on_device",
    "on_device_to_score",
    "pinned",
    "smooth_images",
]

PRECISIONS = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements."""

    towers: dict[str, tuple[str, int, tuple[str, ...]]]
    """Model, image side and methods by section."""
    batches: tuple[int, ...] = (1, 8, 32, 128)
    matrix: int = 8192
    box: float = 0.8
    """Total duration of the timed calls of a row, in seconds, after the warm-up."""
    equality_side: int = 240
    cnn_side: int = 256
    end_to_end: tuple[int, int, int] = (15, 115, 64)
    """Categories, images per category, batch size."""
    maps: tuple[int, int, int] = (64, 16, 518)
    """Maps, batch size, side."""
    points: tuple[int, int, int, int] = (51_200, 267, 5_120, 512)
    """Points, their dimensions, centres, and centres to compare with the CPU's."""
    demo: dict[str, Any] = field(default_factory=dict)
    """Arguments of the demo that override those of ``configs/demo.yaml``."""
    tiny: bool = False


B_16, L_14 = "ViT-B-16-plus-240", "ViT-L-14-336"
FULL = Sizes(
    towers={
        "zero_shot_240": (B_16, 240, ("plain", "sdp", "sdp_plus", "winclip")),
        "zero_shot_518": (L_14, 518, ("plain", "sdp", "sdp_plus")),
        "zero_shot_336": (L_14, 336, ("plain", "sdp", "sdp_plus")),
    },
)
TINY = Sizes(
    towers={"zero_shot_32": (DEMO, 32, ("plain", "sdp", "sdp_plus", "winclip"))},
    batches=(1, 2),
    matrix=64,
    box=0.0,
    equality_side=32,
    cnn_side=64,
    end_to_end=(2, 4, 3),
    maps=(4, 2, 32),
    points=(200, 8, 20, 10),
    demo={"num_test": 4, "picture_size": 64, "categories": ["blue button", "pink pill"]},
    tiny=True,
)


@dataclass
class Lab:
    """The device, the sizes to measure on it, and the deadline."""

    sizes: Sizes
    device: torch.device
    ends: float
    """Time on ``clock`` after which no measurement is started."""
    clock: Callable[[], float] = time.monotonic
    peak: dict[str, float] = field(default_factory=dict)
    """TFLOP/s of matrix products by precision."""
    left_out: list[str] = field(default_factory=list)

    def has_time(self, name: str) -> bool:
        """Return whether there is time to start a measurement; record its name if not."""
        if self.clock() < self.ends:
            return True
        self.left_out.append(name)
        return False

    def synchronised(self) -> float:
        """Wait until the device has finished its work and return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def once(self, task: Callable[[], object]) -> float:
        """Return the seconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            task()
            return time.perf_counter() - start
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        task()
        done.record()
        done.synchronize()
        return float(begun.elapsed_time(done)) / 1e3

    def seconds(self, task: Callable[[], object]) -> list[float]:
        """Call a task at least twice, after a warm-up, and return the seconds of each call."""
        if self.once(task) < self.sizes.box:
            self.once(task)
        seconds: list[float] = []
        while len(seconds) < 2 or (sum(seconds) < self.sizes.box and len(seconds) < 200):
            seconds.append(self.once(task))
        return seconds

    @contextmanager
    def memory(self, into: dict[str, Any]) -> Iterator[None]:
        """Record the peak memory allocated on the device, in MiB; None on a CPU."""
        into["peak_mib"] = into["extra_mib"] = None
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        most = torch.cuda.max_memory_allocated(self.device)
        into["peak_mib"] = round(most / 2**20, 1)
        into["extra_mib"] = round((most - before) / 2**20, 1)


@contextmanager
def matrix_precision(precision: str) -> Iterator[None]:
    """Set TF32 for matrix products and convolutions; ``default`` keeps torch's settings."""
    if precision == "default":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of the frozen tower; for bf16, it is cast as in a bf16-mixed run."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def mixed(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a bf16-mixed run, disabled for other precisions."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def smooth_images(count: int, side: int, seed: int = 0) -> Tensor:
    """Return smooth images, each with a bright square, uint8 ``(count, 3, side, side)``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bilinear") * 200
    images += 20 * torch.rand(images.shape, generator=generator)
    start = side // 4
    images[:, :, start : start + side // 6, start : start + side // 5] = 250
    return images.to(torch.uint8)


def noise(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def host_batches(
    categories: Sequence[str], each: int, side: int, size: int, *, images: bool = True
) -> list[Batch]:
    """Return batches of noise, ordered by category; three of four images have a square as mask."""
    count = each * len(categories)
    names = [name for name in categories for _ in range(each)]
    batches = []
    for rows in torch.arange(count).split(size):
        label = rows % 4 != 0
        mask = torch.zeros(len(rows), side, side, dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            if label[place]:
                top, left = (row * step % (side * 3 // 4) for step in (37, 53))
                mask[place, top : top + side // 8, left : left + side // 6] = True
        batches.append(
            Batch(
                image=noise(len(rows), side) if images else torch.empty(0),
                label=label,
                category=[names[row] for row in rows],
                path=[f"{row:05d}.png" for row in rows.tolist()],
                index=rows,
                mask=mask,
            )
        )
    return batches


def _each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    moved = {k: change(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return Batch(**moved)  # type: ignore[typeddict-item]


def on_device(device: torch.device, batch: Batch) -> Batch:
    """Move a batch to the device."""
    return _each_tensor(batch, lambda value: value.to(device, non_blocking=True))


def on_device_to_score(device: torch.device, batch: Batch) -> Batch:
    """Move a batch to the device as a test does: without labels and masks, which the CPU reads."""
    moved = {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and name not in EVALUATED
        else value
        for name, value in batch.items()
    }
    return Batch(**moved)  # type: ignore[typeddict-item]


def pinned(batch: Batch) -> Batch:
    """Return a copy of a batch in pinned memory."""
    return _each_tensor(batch, Tensor.pin_memory)
