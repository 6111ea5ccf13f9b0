"""MuSc on sequences of images, for ``musc.py``: time of an image, and metrics.

Metrics are measured with r = 3 alone, which takes a third of the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle, islice, product
from statistics import mean, median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from anomaly_clip import load
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.data import AnomalyData, Demo, MagneticTile
from anomaly_clip.demo.photographs import draw_photograph
from anomaly_clip.methods import MuSc
from anomaly_clip.methods.image_features import ImageFeatures
from anomaly_clip.methods.musc_images import drawn_order
from anomaly_clip.methods.mutual_scoring import (
    mean_of_nearest,
    rescore,
    rescore_in_sequence,
    table_of_pairs,
    window,
)
from anomaly_clip.metrics import Evaluator
from anomaly_clip.records import RANDOM

METRICS = ("image_auroc", "pixel_auroc")
MEMORIES = (20, 50, 100, 200)
START = 20
INTERVAL = [0, 0.3]
K_LIST = [1, 2, 3]
R_LIST = [3]
SEEDS = range(3)
LAYERS = ["features.4", "features.7", "features.10"]
DEMO_CLIP = CLIPSettings("demo", "demo", 160)
DEMO_CATEGORIES = ["black leather", "brass washer", "pink pill"]
NUM_DEMO = 240
TIMED_IMAGES = 7

Scored = dict[str, tuple[Tensor, Tensor]]
"""Patch maps ``(n, h, w)`` and image scores ``(n,)`` by scoring."""


def squeezenet(weights: str, **options: Any) -> MuSc:
    """Return MuSc on a SqueezeNet, on a grid of 15 x 15 patches."""
    backbone = CNNSettings("squeezenet1_1", weights, LAYERS)
    return MuSc(backbone, grid=15, k_list=K_LIST, **options)


def milliseconds() -> dict[str, dict[str, float]]:
    """Return the median processor time of a new image in a detector, by images in memory."""
    options: dict[str, Any] = {"scoring": "online", "k_list": K_LIST}
    methods = {
        "SqueezeNet, 3 layers, 225 patches": squeezenet(RANDOM, scoring="online"),
        "demo CLIP, 4 layers, 100 patches": MuSc(DEMO_CLIP, **options),
    }
    # The time does not depend on what is in the images.
    drawn = [
        draw_photograph("black_leather", 0, number, None, 128).image for number in range(START)
    ]
    images = cycle([Image.fromarray(image) for image in drawn])
    elapsed: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        detector, count = load(method, device="cpu"), 0
        elapsed[name] = {}
        for memory in MEMORIES[1:]:
            detector.predict(list(islice(images, memory - count)))
            seconds = []
            for image in islice(images, TIMED_IMAGES):
                began = time.process_time()
                detector.predict(image)
                seconds.append(time.process_time() - began)
            count = memory + TIMED_IMAGES
            elapsed[name][str(memory)] = round(1e3 * median(seconds), 1)
    return elapsed


def demo() -> tuple[MuSc, AnomalyData]:
    """Return MuSc on the demo CLIP, and generated images."""
    data = Demo(
        seed=501,
        categories=DEMO_CATEGORIES,
        num_test=NUM_DEMO,
        picture_size=128,
        image_size=160,
        num_workers=0,
    )
    return MuSc(DEMO_CLIP, k_list=K_LIST, r_list=R_LIST), data


def tiles(root: str, weights: str) -> tuple[MuSc, AnomalyData]:
    """Return MuSc on a SqueezeNet with trained weights, and photographs of magnetic tiles."""
    data = MagneticTile(root=root, image_size=256, batch_size=16, num_workers=0)
    return squeezenet(weights, r_list=R_LIST), data


def metrics_of_sequences(method: MuSc, data: AnomalyData) -> dict[str, Any]:
    """Return the metrics of the batch, and of sequences by memory: mean and range over orders."""
    method.eval()
    data.setup("test")
    batches: list[dict[str, Any]] = []
    parts: list[tuple[str, ImageFeatures]] = []
    for batch in data.test_dataloader():
        halves = method.encoder.halves(batch["image"])
        parts += ImageFeatures(halves, batch["index"]).split(batch["category"])
        batches.append({name: value for name, value in batch.items() if name != "image"})
    scored: dict[str, dict[int, tuple[Tensor, float]]] = {}
    for name in data.categories:
        images = ImageFeatures.joined([part for category, part in parts if category == name])
        for key, (maps, scores) in scored_sequences(method, images, name).items():
            rows = zip(images.index.tolist(), maps, scores.tolist(), strict=True)
            scored.setdefault(key, {}).update({row: (m, score) for row, m, score in rows})
    values: dict[str, dict[str, float]] = {}
    for key, results in scored.items():
        method._scored = results
        evaluator = Evaluator(data.categories)
        for batch in batches:
            evaluator.update(method._score(batch), batch)  # type: ignore[arg-type]
        means = evaluator.compute()["mean"]
        values[key] = {metric: float(means[metric] or 0) for metric in METRICS}
    counts = {"images": len(data.samples("test"))}
    counts["anomalous"] = sum(bool(sample.label) for sample in data.samples("test"))
    return {**counts, **dict(summary(values))}


def summary(values: dict[str, dict[str, float]]) -> Iterator[tuple[str, Any]]:
    """Yield the metrics of the batch, and those of each memory over all orders."""
    yield "batch", {metric: round(values["batch"][metric], 4) for metric in METRICS}
    for memory in MEMORIES:
        by_metric = {}
        for metric in METRICS:
            orders = [values[f"{memory} {seed}"][metric] for seed in SEEDS]
            by_metric[metric] = {
                "mean": round(mean(orders), 4),
                "range": [round(min(orders), 4), round(max(orders), 4)],
                "lost": round(values["batch"][metric] - mean(orders), 4),
            }
        yield f"online, memory {memory}", by_metric


@torch.no_grad()
def scored_sequences(method: MuSc, images: ImageFeatures, name: str) -> Scored:
    """Return the scores of the batch and of all sequences, from one table of all pairs."""
    size, n = method._grid(images), len(images)
    settings = list(product(MEMORIES, SEEDS))
    keys = ["batch", *(f"{memory} {seed}" for memory, seed in settings)]
    totals = {key: torch.zeros(n, size.numel()) for key in keys}
    combinations = list(product(method.layers, method.r_list))
    for layer, r in combinations:
        features = method._aggregated(images.tensors[str(layer)], r, size)
        table = table_of_pairs(features)
        totals["batch"] += mean_of_nearest(table, INTERVAL, n - 1)
        for memory, seed in settings:
            order = drawn_order(n, seed, name)
            for position, row in enumerate(order.tolist()):
                others = order[window(position, START, memory)]
                m = len(others) - (position < START)
                score = mean_of_nearest(table[row][:, others], INTERVAL, m)
                totals[f"{memory} {seed}"][row] += score
    vectors = torch.nn.functional.normalize(
        images.tensors["image"].float() + images.tensors["image_rest"].float(), dim=1
    )
    scored: Scored = {}
    for key, total in totals.items():
        maps = (total / len(combinations)).unflatten(1, size)
        scored[key] = maps, method._raw_scores(maps)
    scored["batch"] = scored["batch"][0], rescore(scored["batch"][1], vectors, K_LIST)
    for memory, seed in settings:
        maps, raw = scored[f"{memory} {seed}"]
        order = drawn_order(n, seed, name)
        scores = torch.zeros(n)
        scores[order] = rescore_in_sequence(
            raw[order], vectors[order], K_LIST, START, memory, range(n)
        )
        scored[f"{memory} {seed}"] = maps, scores
    return scored
