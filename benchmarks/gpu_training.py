"""Training steps of CLIP-ADA, TAB and SDP+ at their published sizes, for ``gpu.py``.

A step is everything that Lightning's loop runs: forward, loss, backward, gradient clipping,
optimiser and logging. Batches of noise are kept in memory, so that no loading is measured.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from bare import clip_ada_parts
from common import one_line
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.backbones.prompts import RVSSettings
from anomaly_clip.data import Demo
from anomaly_clip.methods import CLIPADA, TAB, SDPPlus
from anomaly_clip.records import DEMO, RANDOM, Batch
from anomaly_clip.synthesis import SynthesisSettings

__all__ = ["time_steps"]

CATEGORIES = ["blue button", "pink pill"]
STEPS, WARM_UP = 15, 5


class Step(NamedTuple):
    """A method, its training batches, and the trainer options of its configuration."""

    method: LightningModule
    data: InMemory
    bare: Callable[[], object] | None
    options: dict[str, Any]


class InMemory(Demo):
    """The demo with training batches that are kept in memory."""

    def __init__(self, batches: Sequence[Batch], **options: Any) -> None:
        super().__init__(categories=CATEGORIES, num_workers=0, picture_size=64, **options)
        self.batches = list(batches)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the batches as they are."""
        return DataLoader(self.batches, batch_size=None, pin_memory=torch.cuda.is_available())  # type: ignore[arg-type]


class StepClock(Callback):
    """Time each step, from the batch on the device to the end of the optimiser step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.peak_mib: float | None = None
        self._begun = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_start(self, *_: Any) -> None:
        """Reset the memory statistics."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of a step."""
        self._begun = self._now()

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the duration of a step and the peak memory."""
        self.seconds.append(self._now() - self._begun)
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            self.peak_mib = round(most / 2**20, 1)


def training_batch(size: int, side: int) -> Batch:
    """Return noise images, half of them with a square as defect, and synthetic ones for TAB."""
    shape = (size, 3, side, side)
    mask = torch.zeros(size, side, side, dtype=torch.bool)
    mask[1::2, side // 4 : side // 2, side // 4 : side // 2] = True
    return Batch(
        image=torch.randint(0, 256, shape, dtype=torch.uint8),
        synthetic=torch.randint(0, 256, shape, dtype=torch.uint8),
        label=torch.arange(size) % 2 == 1,
        category=[CATEGORIES[row % 2] for row in range(size)],
        path=[f"{row}.png" for row in range(size)],
        index=torch.arange(size),
        mask=mask,
    )


def clip_ada(device: torch.device, tiny: bool, steps: int) -> Step:
    """Return CLIP-ADA as in ``configs/clip_ada.yaml``: ViT-B/16, 256 px, batch 32, bf16."""
    name, side, size = (DEMO, 32, 2) if tiny else ("ViT-B-16-quickgelu", 256, 32)
    method = CLIPADA(CLIPSettings(name, RANDOM, side))
    batch = training_batch(size, side)
    data = InMemory([batch] * steps, synthesis=SynthesisSettings("perlin"))

    def bare() -> None:
        frozen, trained = parts
        with torch.autocast(device.type, torch.bfloat16):
            trained(frozen(method.backbone.prepare(images)))

    parts, images = clip_ada_parts(method.to(device)), batch["image"].to(device)
    return Step(method, data, bare, {"precision": "bf16-mixed", "gradient_clip_val": 1.0})


def tab(device: torch.device, tiny: bool, steps: int) -> Step:
    """Return TAB as in ``configs/tab.yaml``: a ResNet-18, 224 px, 128 pairs, float32."""
    text, side, size = (DEMO, 32, 2) if tiny else ("ViT-B-16", 224, 128)
    method = TAB(
        CNNSettings("resnet18", RANDOM), CLIPSettings(text, RANDOM), image_size=side, seed=42
    )
    batch = training_batch(size, side)
    pair = SynthesisSettings("nsa", "tab", mode="pair")
    data = InMemory([batch] * steps, synthesis=pair, batch_size=size)
    mean, std = (torch.tensor(getattr(method.settings, name)) for name in ("mean", "std"))
    both = [
        ((images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(device)
        for images in (batch["image"], batch["synthetic"])
    ]

    def bare() -> None:
        method.train()
        method.zero_grad()
        method.encoder(both[0]).mean().add(method.encoder(both[1]).mean()).backward()

    return Step(method, data, bare, {"precision": "32-true"})


def sdp_plus(device: torch.device, tiny: bool, steps: int, *, kept: bool) -> Step:
    """Return SDP+ as in its configurations: ViT-B/16-plus, 240 px, batch 8, float32.

    Args:
        device: Device to run on.
        tiny: Use tiny sizes, for tests.
        steps: Number of batches.
        kept: Use cached features of the tower, as after the first epoch, so that a step runs only
            the linear layers. Otherwise images are encoded in each step.
    """
    name, side, size = (DEMO, 32, 2) if tiny else ("ViT-B-16-plus-240", 240, 8)
    backbone = CLIPBackbone(name, RANDOM, side)
    method = SDPPlus(backbone, rvs=RVSSettings("mean"), feature_cache_gb=0.0).to(device)
    batch = training_batch(size, side)
    tokens = method.tokens(batch["image"].to(device), scoring=False)
    if kept:
        batch["features"] = {key: value.half().cpu() for key, value in tokens.items()}
        del batch["image"]  # type: ignore[misc]
    labelled = Demo(seed=1, categories=CATEGORIES, num_test=4, picture_size=64, num_workers=0)
    data = InMemory([batch] * steps, auxiliary=labelled)
    raw = [tokens[f"raw.{stage}"].half() for stage in method.stages]

    def bare() -> None:
        method.zero_grad()
        passed = [layer(part.float()) for layer, part in zip(method.fc, raw, strict=True)]
        torch.stack([part.mean() for part in passed]).sum().backward()

    return Step(method, data, bare if kept else None, {"precision": "32-true"})


def time_steps(
    device: torch.device,
    tiny: bool,
    has_time: Callable[[str], bool],
    once: Callable[[Callable[[], object]], float],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each training step.

    Args:
        device: Device to run on.
        tiny: Use tiny sizes, for tests.
        has_time: Function that returns whether there is time to start the row of that name.
        once: Function that returns the seconds of a call on the device.
    """
    steps, warm_up = (3, 1) if tiny else (STEPS, WARM_UP)
    makers: dict[str, Callable[[], Step]] = {
        "CLIP-ADA": lambda: clip_ada(device, tiny, steps),
        "TAB": lambda: tab(device, tiny, steps),
        "SDP+, linear layers on kept features": lambda: sdp_plus(device, tiny, steps, kept=True),
        "SDP+, from images": lambda: sdp_plus(device, tiny, steps, kept=False),
    }
    for name, make in makers.items():
        if not has_time(f"training, {name}"):
            continue
        try:
            row = timed(make(), device, once, warm_up)
        except Exception as error:  # the other steps are still worth running
            traceback.print_exc()
            row = {"error": one_line(error)}
        yield {"step": name, **row}


def timed(
    step: Step,
    device: torch.device,
    once: Callable[[Callable[[], object]], float],
    warm_up: int,
) -> dict[str, Any]:
    """Return the milliseconds of a step and of its bare passes, and the peak memory of the fit."""
    clock = StepClock(device)
    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **step.options,
    )
    trainer.fit(step.method, datamodule=step.data)
    median = statistics.median(clock.seconds[warm_up:])
    row: dict[str, Any] = {
        **step.options,
        "batch": len(step.data.batches[0]["label"]),
        "step_ms": round(1e3 * median, 3),
        "peak_mib": clock.peak_mib,
        "timings": len(clock.seconds) - warm_up,
    }
    if step.bare is None:
        return row
    step.method.to(device)  # the trainer has moved it back to the host
    calls = [once(step.bare) for _ in range(2 + len(clock.seconds))][2:]
    bare = statistics.median(calls)
    return {**row, "bare_ms": round(1e3 * bare, 3), "times_bare": round(median / bare, 3)}
