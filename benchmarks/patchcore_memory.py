"""Fit PatchCore in bounded memory on real photographs, and print one JSON line.

    python benchmarks/patchcore_memory.py DIR --weights squeezenet1_1_imagenet.safetensors

DIR holds the magnetic tiles in MVTec-AD's layout, ``--weights`` is a file with the weights of a
torchvision SqueezeNet. Each fit to 150 normal images of 256 pixels runs in a process of its own,
without and with ``model.memory_gb``. Reported are the image AUROC, the patches in the bank, the
processor seconds of the fit, and how much the peak memory of the process rises in the fit. The exit
status is 1 if a fit in at most 1 GiB, or in ``SMALLEST`` GB, loses more than half a point of image
AUROC.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
import warnings
from multiprocessing import get_context
from typing import Any

import torch
from common import at_most, parser, report
from coreset import SHOTS, SIDE, detector, image_aurocs, tiles
from lightning.pytorch import Trainer

from anomaly_clip.progress import silence

CORESET = 0.01  # few enough that four fits and tests take minutes
MEMORY_GB = (1.0, 0.2, 0.05)
SMALLEST = 0.2
MOST_LOST = 0.005


def fitted(root: str, weights: str, memory_gb: float | None) -> dict[str, Any]:
    """Fit with bounded memory in this process; return its cost, and the image AUROC."""
    warnings.filterwarnings("ignore")
    silence(True)
    torch.set_num_threads(1)
    data, method = tiles(root), detector(weights, coreset=CORESET, memory_gb=memory_gb)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        trainer.fit(method, datamodule=data)
    row = {
        "memory_gb": memory_gb,
        "cpu_seconds": round(time.process_time() - began, 1),
        "peak_mib_of_fit": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10,
        "bank": len(method.bank),
    }
    return {**row, "image_auroc": image_aurocs(method, data, [method.bank])[0]}


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", help="folder of the magnetic tiles")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    fits = []
    for memory_gb in (None, *MEMORY_GB):
        with get_context("spawn").Pool(1) as pool:
            fits.append(pool.apply(fitted, (options.root, options.weights, memory_gb)))
    full, *bounded = (fit["image_auroc"] for fit in fits)
    bounds = {
        f"image AUROC lost with {memory_gb} GB": at_most(full - value, MOST_LOST)
        for memory_gb, value in zip(MEMORY_GB, bounded, strict=True)
        if memory_gb >= SMALLEST
    }
    values = {"images": SHOTS, "side": SIDE, "coreset": CORESET, "fits": fits}
    return report("patchcore_memory", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
