"""Time zero-shot SDP against open_clip's own plain image forward of the same model.

Prints one JSON line: for each batch size the seconds of both (the minimum of interleaved rounds,
same process, same threads), their ratio and the largest difference between the maps of the public
path and of a plain implementation of the specification. Exit status 1 if a ratio is above the
target.

    python benchmarks/zero_shot.py --rounds 9 --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.methods import SDP
from anomaly_clip.runs import versions

TARGET = 1.20


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="ViT-B-16-plus-240")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sdp = SDP(CLIPSettings(options.name, "random"))
    report: dict[str, object] = {
        "benchmark": "zero_shot",
        "command": shlex.join(["python", *sys.argv]),
        "model": options.name,
        "weights": "random",
        "precision": "float32",
        "threads": options.threads,
        "rounds": options.rounds,
        "target": TARGET,
        "machine": platform.processor() or platform.machine(),
        "torch": versions()["torch"],
    }
    ratios = []
    for size in options.batches:
        side = sdp.image_size
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
        text = F.normalize(torch.randn(size, sdp.backbone.model.visual.output_dim, 2), dim=1)
        pixels = sdp.backbone.prepare(images)
        seconds = interleaved(
            options.rounds,
            plain=partial(sdp.backbone.model.encode_image, pixels),
            sdp=partial(sdp.score_with_text, images, text),
        )
        ratios.append(seconds["sdp"] / seconds["plain"])
        with torch.no_grad():
            difference = (
                (sdp.score_with_text(images, text)["anomaly_map"] - plain_sdp(sdp, images, text))
                .abs()
                .max()
            )
        report[f"batch_{size}"] = {
            **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
            "ratio": round(ratios[-1], 3),
            "largest_map_difference": float(difference),
        }
    report["met"] = max(ratios) <= TARGET
    print(json.dumps(report))
    return 0 if report["met"] else 1


def interleaved(rounds: int, **tasks: Callable[[], object]) -> dict[str, float]:
    """Return the smallest seconds of each task over rounds in which all take turns."""
    best = dict.fromkeys(tasks, float("inf"))
    with torch.no_grad():
        for task in tasks.values():
            task()
        for _ in range(rounds):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def plain_sdp(sdp: SDP, images: Tensor, text: Tensor) -> Tensor:
    """Compute the maps as the specification's sections 4 and 5 say, step by step."""
    visual = sdp.backbone.visual
    original = sdp.backbone.embed(images)
    width = original.shape[-1]
    surgery, kept, previous = original, {}, None
    step = len(visual.transformer.resblocks) // 4
    for number, block in enumerate(visual.transformer.resblocks, start=1):
        attention = block.attn
        mixed = block.ln_1(original) @ attention.in_proj_weight.T + attention.in_proj_bias
        q, k, v = (
            part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in mixed.split(width, dim=-1)
        )
        scale = q.shape[-1] ** -0.5
        ordinary = (q @ k.mT * scale).softmax(-1) @ v
        ordinary = attention.out_proj(ordinary.transpose(1, 2).flatten(2))
        values = (v @ v.mT * scale).softmax(-1) @ v
        values = attention.out_proj(values.transpose(1, 2).flatten(2))
        if previous is not None:
            kept[number - 1] = (original + ordinary, previous)
        surgery = values if (number - 1) % step == 0 else surgery + values
        original = original + ordinary
        original = original + block.mlp(block.ln_2(original))
        previous = surgery if number % step == 0 else None
    kept[len(visual.transformer.resblocks)] = (original, surgery)
    total = torch.zeros(len(images), original.shape[1] - 1)
    for first, patches in kept.values():
        tokens = torch.cat([first[:, :1], patches[:, 1:]], dim=1)
        tokens = F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)
        weights = (tokens[:, :1] @ text).softmax(-1)
        weighted = tokens @ text * weights * 2
        total += (weighted - weighted.mean(-1, keepdim=True))[:, 1:, 1]
    side = round(total.shape[1] ** 0.5)
    grid = total.reshape(-1, 1, side, side)
    maps = F.interpolate(grid, (sdp.image_size, sdp.image_size), mode="bilinear")[:, 0]
    return torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), sdp.sigma)) for m in maps])


if __name__ == "__main__":
    sys.exit(main())
