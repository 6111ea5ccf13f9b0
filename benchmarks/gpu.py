"""Measure speed, memory and agreement with the CPU on a CUDA device and write one JSON object.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only peak zero_shot_240 --out gpu.json

Weights are random. This does not affect the timings, but the metrics mean nothing. Rates are
compared with the rate of the card's matrix products, measured in the same call. Sections for which
no time is left are skipped, and the result lists their names. Without a CUDA device nothing is
measured. ``--tiny`` runs everything on the CPU at tiny sizes, for tests; the timings then mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, Bound, at_least, at_most, fastest, one_line, result
from gpu_equality import equality, precision_drift
from gpu_lab import (
    B_16,
    FULL,
    L_14,
    TINY,
    Lab,
    Sizes,
    dtype_of,
    host_batches,
    matrix_precision,
    mixed,
    on_device,
    on_device_to_score,
    pinned,
)
from gpu_training import time_steps
from gpu_zero_shot import peak, replays, zero_shot
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods import SDP
from anomaly_clip.methods.coreset import k_centre_greedy
from anomaly_clip.metrics import Evaluator, EvaluatorSettings
from anomaly_clip.records import DEMO, RANDOM, Batch

MARGIN = 30.0
"""Seconds before the deadline in which no measurement is started."""
MOST_APART = 1e-4
"""Largest allowed difference from the CPU's maps, as a fraction of their range."""


def end_to_end(lab: Lab) -> dict[str, Any]:
    """Time SDP from images in the host's memory to metrics."""
    num_categories, each, size = lab.sizes.end_to_end
    name, side = (DEMO, 32) if lab.sizes.tiny else (B_16, 240)
    categories = [f"object {number}" for number in range(num_categories)]
    batches = host_batches(categories, each, side, size)
    if lab.device.type == "cuda":
        batches = [pinned(batch) for batch in batches]
    moved = [on_device(lab.device, batch) for batch in batches]
    results: dict[str, Any] = {"images": num_categories * each, "batch": size, "model": name}
    for precision in ("bf16", "fp32"):
        sdp = SDP(CLIPSettings(name, RANDOM, side)).to(lab.device).eval()
        sdp.backbone.cast(dtype_of(precision))
        start = lab.synchronised()
        sdp.prepare(categories)
        prepared = lab.synchronised() - start
        row: dict[str, Any] = {"text_seconds": round(prepared, 3)}
        tasks = {
            "scored": partial(score_all, sdp, moved),
            "scored_and_measured": partial(measure_all, lab, sdp, categories, batches),
        }
        with (
            torch.inference_mode(),
            matrix_precision("default"),
            mixed(lab.device, precision),
            lab.memory(row),
        ):
            seconds = fastest(1 if lab.sizes.tiny else 3, tasks, clock=lab.synchronised)
        row |= {f"{task}_seconds": round(value, 4) for task, value in seconds.items()}
        row["share_of_bare_loop"] = round(seconds["scored"] / seconds["scored_and_measured"], 4)
        results[precision] = row
    return results


def score_all(sdp: SDP, batches: Sequence[Batch]) -> None:
    for number, batch in enumerate(batches):
        sdp.predict_step(batch, number)


def measure_all(lab: Lab, sdp: SDP, categories: list[str], batches: Sequence[Batch]) -> None:
    evaluator = Evaluator(categories).to(lab.device)
    for number, batch in enumerate(batches):
        moved = on_device_to_score(lab.device, batch)
        evaluator.update(sdp.predict_step(moved, number), moved)
    evaluator.compute()


def streaming_metrics(lab: Lab) -> list[dict[str, Any]]:
    """Return the cost of pixel metrics on the device, and how far they are off the CPU's."""
    count, size, side = lab.sizes.maps
    batches = host_batches(["object"], count, side, size, images=False)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 32, 32, generator=generator)
    maps = F.interpolate(coarse, (side, side), mode="bilinear")[:, 0]
    maps = gaussian_blur(maps + torch.cat([batch["mask"] for batch in batches]), side / 80)
    rows = []
    for dtype, fine in ((torch.float32, False), (torch.float32, True), (torch.float16, False)):
        name = f"{str(dtype).removeprefix('torch.')}, {20 if fine else 16}-bit keys"
        if not lab.has_time(f"streaming metrics, {name}"):
            continue
        row: dict[str, Any] = {"scores": name, "maps": count, "side": side, "batch": size}
        results = {}
        for place, device in (("cpu", torch.device("cpu")), ("device", lab.device)):
            pairs = list(zip(maps.to(device, dtype).split(size), batches, strict=True))
            moved = [(part, on_device(device, batch)) for part, batch in pairs]
            evaluator = Evaluator(["object"], EvaluatorSettings(fine=fine)).to(device)
            memory: dict[str, Any] = {}
            with torch.inference_mode(), lab.memory(memory):
                task = partial(_update, evaluator, moved)
                seconds = fastest(2, {"update": task}, clock=lab.synchronised)["update"]
            start = time.perf_counter()
            results[place] = evaluator.compute()["mean"]
            row[f"{place}_ms_per_image"] = round(1e3 * seconds / count, 4)
            row[f"{place}_compute_seconds"] = round(time.perf_counter() - start, 4)
        row |= memory
        row["largest_difference"] = max(
            abs((value or 0.0) - (results["device"][key] or 0.0))
            for key, value in results["cpu"].items()
        )
        rows.append(row)
    return rows


def _update(evaluator: Evaluator, pairs: Sequence[tuple[Tensor, Batch]]) -> None:
    evaluator.reset()
    for maps, batch in pairs:
        evaluator.update({"anomaly_map": maps, "image_score": maps.flatten(1).amax(1)}, batch)


def coreset(lab: Lab) -> dict[str, Any]:
    """Time a coreset centre and a matrix-vector product; compare the centres with the CPU's."""
    count, width, num_centres, num_compared = lab.sizes.points
    host = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    points = host.to(lab.device)
    row: dict[str, Any] = {"points": count, "width": width, "centres": num_centres}
    vector = points[0].clone()
    products = partial(_products, points, vector, 50)
    row["product_ms"] = 1e3 * statistics.median(lab.seconds(products)) / 50
    with lab.memory(row):
        tasks = {"centres": partial(k_centre_greedy, points, num_centres, 0)}
        seconds = fastest(1, tasks, clock=lab.synchronised)["centres"]
    row["centre_ms"] = 1e3 * seconds / num_centres
    row["centre_over_product"] = row["centre_ms"] / row["product_ms"]
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        ours = k_centre_greedy(points.to(dtype), num_compared, 0).cpu()
        expected = k_centre_greedy(host.to(dtype), num_compared, 0)
        differ = (ours != expected).nonzero()
        same = int(differ[0]) if len(differ) else num_compared
        row[f"same_centres_{name}"] = f"the first {same} of {num_compared}"
        row[f"same_share_{name}"] = same / num_compared
    return row


def _products(points: Tensor, vector: Tensor, count: int) -> None:
    for _ in range(count):
        torch.mv(points, vector)


def training(lab: Lab) -> list[dict[str, Any]]:
    """Return the cost of training steps at their published sizes."""
    return list(time_steps(lab.device, lab.sizes.tiny, lab.has_time, lab.once))


def sections(sizes: Sizes) -> dict[str, Callable[[Lab], Any]]:
    """Return the sections in order: the peak first, the longest last."""
    towers = {
        name: partial(zero_shot, name=model, side=side, methods=methods)
        for name, (model, side, methods) in sizes.towers.items()
    }
    first, *others = towers
    return {
        "peak": peak,
        first: towers[first],
        "replays": replays,
        "equality": equality,
        "precision_drift": precision_drift,
        "end_to_end": end_to_end,
        "streaming_metrics": streaming_metrics,
        "coreset": coreset,
        "training": training,
        **{name: towers[name] for name in others},
    }


def bounds_of(results: dict[str, Any], sizes: Sizes) -> dict[str, Bound]:
    """Return the bounds with their values; a value is None if it was not measured."""
    rows = [row for name in sizes.towers for row in results.get(name, []) if "error" not in row]
    bounds: dict[str, Bound] = {}
    for name, side, most in ((B_16, 240, 1.25), (L_14, 518, 1.35)):
        large = [
            row for row in rows
            if (row["model"], row["side"], row["precision"]) == (name, side, "bf16")
            and row["batch"] >= 32
        ]  # fmt: skip
        plain = [row["share_of_peak"] for row in large if row["method"] == "plain"]
        share = min((value for value in plain if value is not None), default=None)
        bounds[f"plain encoder over the bf16 peak, {side} px"] = at_least(share, 0.4)
        sdp = [row["ratio_to_plain"] for row in large if row["method"] == "sdp"]
        times = max((value for value in sdp if value is not None), default=None)
        bounds[f"SDP over the plain encoder, {side} px"] = at_most(times, most)
    by_key: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = row["method"], row["model"], row["side"], row["batch"]
        by_key.setdefault(key, {})[row["precision"]] = row["seconds_per_image"]
    slower = [r["bf16"] / r["fp32"] for r in by_key.values() if r.keys() >= {"bf16", "fp32"}]
    bounds["bf16 over fp32 seconds, the worst row"] = at_most(max(slower, default=None), 1.0)
    for method in ("SDP", "SDPPlus", "WinCLIP", "PaDiM", "PatchCore"):
        apart = [
            row["difference_fp32"] for row in results.get("equality", []) if row["method"] == method
        ]
        name = f"maps of {method} off the CPU's, share of their range"
        bounds[name] = at_most(max(apart, default=None), MOST_APART)
    run = results.get("end_to_end", {}).get("bf16", {})
    images = sizes.end_to_end[0] * sizes.end_to_end[1]
    seconds = run.get("scored_and_measured_seconds")
    bounds[f"seconds to score and measure {images} images, bf16"] = at_most(seconds, 3.0)
    bounds["the same over the bare loop"] = at_least(run.get("share_of_bare_loop"), 0.8)
    metrics = [row["largest_difference"] for row in results.get("streaming_metrics", [])]
    bounds["metrics off the CPU's"] = at_most(max(metrics, default=None), 1e-12)
    recorded = results.get("replays", [])
    single = [
        row["recorded_over_ordinary"]
        for row in recorded
        if (row["method"], row["batch"], row["precision"]) == ("sdp", 1, "bf16")
    ]
    name = "recorded over ordinary milliseconds, SDP, one image, bf16"
    bounds[name] = at_most(max(single, default=None), 0.6, 0.4)
    changed = max((row["difference"] for row in recorded), default=None)
    name = "maps of recorded passes off ordinary ones, share of their range"
    bounds[name] = at_most(changed, 1e-5)
    same = results.get("coreset", {}).get("same_share_float64")
    bounds["centres equal to the CPU's, float64"] = at_least(same, 1.0)
    return bounds


def write(file: Path, content: dict[str, Any]) -> None:
    """Write a result atomically, so that a reader sees either the old or the new file."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def run(lab: Lab, out: Path, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the sections in turn; after each, write all results so far to the file."""
    start = time.monotonic()
    results: dict[str, Any] = {}
    errors: dict[str, str] = {}
    chosen = {k: v for k, v in sections(lab.sizes).items() if only is None or k in only}
    for name, section in chosen.items():
        if lab.has_time(name):
            begun = time.monotonic()
            try:
                results[name] = section(lab)
            except Exception as error:  # the other sections are still worth running
                traceback.print_exc()
                errors[name] = one_line(error)
            if lab.device.type == "cuda":
                torch.cuda.empty_cache()
            taken = time.monotonic() - begun
            sys.stderr.write(f"{name}: {taken:.1f} s\n")
        values = {
            "weights": "random, but for the demo CLIP in equality and precision_drift",
            "tiny": lab.sizes.tiny,
            **results,
            "left_out": lab.left_out,
            "errors": errors,
            "complete": results.keys() == sections(lab.sizes).keys() and not lab.left_out,
            "seconds": round(time.monotonic() - start, 1),
        }
        arguments = (["--tiny"] if lab.sizes.tiny else []) + (["--only", *only] if only else [])
        content = result("gpu", values, bounds_of(results, lab.sizes), arguments)
        write(out, content)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="file of the result")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit in minutes")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="default: all sections")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, for tests")
    options = parser.parse_args(arguments)
    sizes = TINY if options.tiny else FULL
    unknown = sorted(set(options.only or ()) - sections(sizes).keys())
    if unknown:
        parser.error(f"unknown section {unknown[0]}: choose from {', '.join(sections(sizes))}")
    if not (options.tiny or torch.cuda.is_available()):
        sys.stdout.write("gpu: no CUDA device is available, so nothing was measured.\n")
        return 0
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    ends = time.monotonic() + 60 * options.minutes - (0 if options.tiny else MARGIN)
    lab = Lab(sizes, torch.device("cpu" if options.tiny else "cuda"), ends)
    content = run(lab, options.out, options.only)
    sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
    missed = [name for name, bound in content["bounds"].items() if bound["met"] is False]
    return int(bool(missed or content["errors"]))


if __name__ == "__main__":
    sys.exit(main())
