"""Speed of the image towers and of zero-shot methods, for ``gpu.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import one_line
from flops import plain_flop, sdp_flop, sdp_plus_flop, tower_of, winclip_flop
from gpu_lab import PRECISIONS, Lab, dtype_of, matrix_precision, mixed, noise
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods import SDP, SDPPlus, WinCLIP
from anomaly_clip.records import RANDOM

__all__ = ["measured_row", "peak", "zero_shot"]

FLOPS = {
    "plain": plain_flop,
    "sdp": sdp_flop,
    "sdp_plus": sdp_plus_flop,
    "winclip": winclip_flop,
}


def peak(lab: Lab) -> dict[str, Any]:
    """Return the rates of the card: square matrix products by precision, and a memory copy."""
    size, device = lab.sizes.matrix, lab.device
    for precision in PRECISIONS:
        a, b = (torch.randn(size, size, device=device, dtype=dtype_of(precision)) for _ in "ab")
        with matrix_precision(precision):
            seconds = statistics.median(lab.seconds(partial(torch.mm, a, b)))
        lab.peak[precision] = 2 * size**3 / seconds / 1e12
    source = torch.randn(16 * size * size, device=device)
    target = torch.empty_like(source)
    copied = statistics.median(lab.seconds(partial(target.copy_, source)))
    return {
        "matrix_size": size,
        "tflop_per_second": {name: round(rate, 2) for name, rate in lab.peak.items()},
        "copy_gb_per_second": round(2 * source.nbytes / copied / 1e9, 1),
    }


def zero_shot(lab: Lab, name: str, side: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each precision, batch size and method of a tower."""
    backbone = CLIPBackbone(name, RANDOM, side).to(lab.device)
    flop = {method: FLOPS[method](tower_of(backbone)) for method in methods}
    scorers: dict[str, SDP | WinCLIP] = {
        method: kind(backbone).to(lab.device).eval()
        for method, kind in (("sdp", SDP), ("sdp_plus", SDPPlus), ("winclip", WinCLIP))
        if method in methods
    }
    rows = []
    for precision in PRECISIONS:
        backbone.cast(dtype_of(precision))
        for batch in lab.sizes.batches:
            images = noise(batch, side).to(lab.device)
            text = F.normalize(torch.randn(batch, backbone.visual.output_dim, 2), dim=1)
            text = text.to(lab.device)
            tasks: dict[str, Callable[[], object]] = {
                "plain": partial(encode_plainly, backbone, backbone.prepare(images))
            }
            for method, scorer in scorers.items():
                tasks[method] = partial(scorer.score_with_text, images, text)
            of_plain = None
            for method in methods:
                label = f"{method}, {name}, {side} px, {precision}, batch {batch}"
                if not lab.has_time(label):
                    continue
                row = measured_row(lab, tasks[method], precision, batch, flop[method], of_plain)
                if method == "plain":
                    of_plain = row.get("seconds_per_image")
                rows.append({"method": method, "model": name, "side": side, **row})
    return rows


def encode_plainly(backbone: CLIPBackbone, pixels: Tensor) -> Tensor:
    """Run the image tower alone, with cast weights and without autocast, as all methods do."""
    with backbone.out_of_autocast():
        features: Tensor = backbone.visual(pixels)
    return features


def measured_row(
    lab: Lab,
    task: Callable[[], object],
    precision: str,
    batch: int,
    flop: int,
    of_plain: float | None,
) -> dict[str, Any]:
    """Return the times and rates of a task, or its error, such as running out of memory.

    Args:
        lab: Device and sizes.
        task: Function that scores a batch.
        precision: One of ``PRECISIONS``.
        batch: Batch size.
        flop: Operations per image.
        of_plain: Seconds per image of the plain encoder.
    """
    row: dict[str, Any] = {"precision": precision, "batch": batch}
    try:
        with (
            torch.inference_mode(),
            matrix_precision(precision),
            mixed(lab.device, precision),
            lab.memory(row),
        ):
            seconds = lab.seconds(task)
    except RuntimeError as error:  # includes torch.OutOfMemoryError
        row["error"] = one_line(error)
    if "error" in row:  # outside the except block, which keeps the tensors alive
        if lab.device.type == "cuda":
            torch.cuda.empty_cache()
        return row
    each = statistics.median(seconds) / batch
    rate = flop / each / 1e12
    limit = lab.peak.get(precision)
    return {
        **row,
        "seconds_per_image": each,
        "images_per_second": round(1 / each, 2),
        "gflop_per_image": round(flop / 1e9, 2),
        "tflop_per_second": round(rate, 3),
        "share_of_peak": None if limit is None else round(rate / limit, 4),
        "ratio_to_plain": None if of_plain is None else round(each / of_plain, 4),
        "timings": len(seconds),
    }
