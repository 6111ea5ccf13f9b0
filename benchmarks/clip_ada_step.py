"""Time a training step of CLIP-ADA and its bare parts, and print one JSON line.

    python benchmarks/clip_ada_step.py

The network is a ViT-B/16 with random weights at 256 pixels, batch size 8, on one thread. The parts
are open_clip's own code: the image tower up to block 7 without gradients, and the forward and
backward pass of the trained modules (two linear layers, one block, and the text tower over one
prompt) without masks, losses and bookkeeping. A step is everything that Lightning's loop runs,
including gradient clipping and the optimiser. A second run measures the fraction of time in which
the loop waits for images. Two data loader workers read files of 900 x 900 pixels and add Perlin
defects to them. The exit status is 1 if a step takes more than 1.25 times as long as its parts, or
if the loop waits for more than 5 % of the time.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bare import clip_ada_parts
from common import at_most, parser, report
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.callbacks import DataWaitMonitor
from anomaly_clip.data import IndustrialFolders
from anomaly_clip.demo.photographs import draw_photograph
from anomaly_clip.methods import CLIPADA
from anomaly_clip.synthesis import SynthesisSettings

BATCH, SIDE = 8, 256
MOST_TIMES, MOST_WAITING = 1.25, 0.05


def write_files(root: Path, count: int) -> None:
    for number in range(count):
        picture = draw_photograph("oak", 0, number, size=900)
        folder = root / "oak"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.image).save(folder / f"{number:03d}.png")


def trainer(steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    method = CLIPADA(CLIPSettings("ViT-B-16-quickgelu", "random", SIDE))
    frozen, trained = clip_ada_parts(method)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_files(root, 2 * rounds * BATCH)
        data = IndustrialFolders(
            str(root),
            synthesis=SynthesisSettings("perlin"),
            batch_size=BATCH,
            num_workers=2,
        )
        data.image_size = SIDE
        batch = next(iter(data.train_dataloader()))
        seconds: dict[str, list[float]] = {"frozen": [], "trained": [], "step": []}

        class Parts(Callback):
            """Time both parts between the steps of the training loop."""

            def on_train_batch_start(self, *_: Any) -> None:
                """Run both parts, then start the clock of the step."""
                pixels = method.backbone.prepare(batch["image"])
                start = time.process_time()
                tokens = frozen(pixels)
                between = time.process_time()
                with torch.enable_grad():
                    trained(tokens)
                self.begun = time.process_time()
                seconds["frozen"].append(between - start)
                seconds["trained"].append(self.begun - between)

            def on_train_batch_end(self, *_: Any) -> None:
                """Record the duration of the step."""
                seconds["step"].append(time.process_time() - self.begun)

        trainer(rounds + 1, Parts()).fit(
            method,
            DataLoader([batch] * (rounds + 1), batch_size=None),  # type: ignore[arg-type]
        )
        waiting = DataWaitMonitor()
        again = CLIPADA(method.backbone)
        trainer(2 * rounds, waiting).fit(again, datamodule=data)
    least = {name: min(values[1:]) for name, values in seconds.items()}
    times = least["step"] / (least["frozen"] + least["trained"])
    share = waiting.share
    values = {
        "seconds": {name: round(value, 3) for name, value in least.items()},
        "times_its_parts": round(times, 3),
        "waiting_share": round(share, 4),
    }
    bounds = {
        "step over its parts": at_most(times, MOST_TIMES),
        "waiting share": at_most(share, MOST_WAITING),
    }
    return report("clip_ada_step", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
