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

__all__ = ["measured_row", "peak", "replays", "zero_shot"]

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
                "plain": partial(encode_plainly, backbone, images)
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


def encode_plainly(backbone: CLIPBackbone, images: Tensor) -> Tensor:
    """Run the image tower alone, cast, without autocast and recorded, as all methods do."""

    def encode(images: Tensor) -> Tensor:
        with backbone.out_of_autocast():
            features: Tensor = backbone.visual(backbone.prepare(images))
        return features

    return backbone.replayed(encode, "plain", images)


def replays(lab: Lab) -> list[dict[str, Any]]:
    """Compare recorded with ordinary passes: milliseconds for few images, and maps."""
    rows = []
    first, *others = lab.sizes.towers.values()
    for name, side, methods in (first, *others[:1]):
        backbone = CLIPBackbone(name, RANDOM, side).to(lab.device)
        kinds = {"sdp": SDP, "winclip": WinCLIP}
        for precision in ("bf16", "fp32"):
            backbone.cast(dtype_of(precision))
            for batch in (1, 8):
                for method, kind in kinds.items():
                    label = f"replays, {method}, {name}, {precision}, batch {batch}"
                    if method in methods and lab.has_time(label):
                        scorer = kind(backbone).to(lab.device).eval()
                        row = {"method": method, "model": name, "side": side, "batch": batch}
                        rows.append({**row, **_recorded_row(lab, scorer, precision, batch)})
    return rows


def _recorded_row(lab: Lab, scorer: SDP | WinCLIP, precision: str, batch: int) -> dict[str, Any]:
    backbone, side = scorer.backbone, scorer.image_size
    text = F.normalize(torch.randn(batch, backbone.visual.output_dim, 2), dim=1).to(lab.device)
    images = [noise(batch, side).to(lab.device) for _ in range(3)]
    row: dict[str, Any] = {"precision": precision}
    maps: dict[bool, list[Tensor]] = {}
    with torch.inference_mode(), matrix_precision(precision), mixed(lab.device, precision):
        for enabled in (False, True):
            backbone.replays.enabled = enabled
            task = partial(scorer.score_with_text, images[0], text)
            name = "recorded" if enabled else "ordinary"
            row[f"{name}_ms"] = 1e3 * statistics.median(lab.seconds(task))
            maps[enabled] = [scorer.score_with_text(x, text)["anomaly_map"] for x in images]
    extent = max(float(part.max() - part.min()) for part in maps[False])
    apart = [float((a - b).abs().max()) for a, b in zip(maps[False], maps[True], strict=True)]
    row["recorded_over_ordinary"] = row["recorded_ms"] / row["ordinary_ms"]
    row["difference"] = max(apart) / extent
    return row


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
