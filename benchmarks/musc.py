"""Measure speed and memory of MuSc, and what it loses on sequences of images; print one JSON line.

    python benchmarks/musc.py DIR --weights squeezenet1_1_imagenet.safetensors
    python benchmarks/musc.py DIR --weights FILE --only scoring --folder parts

- ``scoring``: processor time of the whole scoring (aggregation, mutual scores, maximum of the maps,
  re-scoring) compared with a plain form, which compares each image with a copy of all others by
  ``torch.cdist``. The features are random, with the geometry of ViT-B-16-plus-240: 225 patches of
  width 896. Layers and sides of the neighbourhood take equally long, so one layer is measured, at
  64 images with r 1, 3 and 5 on one thread, and with r 3 at 64 and 200 images on two.
- ``memory``: peak memory of mutual scores compared with the features and the table of all pairs, in
  a process of its own.
- ``speed``: processor time of a new image in a detector with ``scoring: online``.
- ``demo``, ``tiles``: metrics of ``online`` and of ``batch``, on generated images and on the
  photographs of DIR (magnetic tiles in MVTec-AD's layout); see musc_sequences.py.

``--folder`` keeps the values of parts; parts in the folder are not measured again. The exit status
is 1 if a bound is missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import musc_sequences as sequences
import numpy as np
import torch
import torch.nn.functional as F
from common import Bound, at_most, fastest, parser, report
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.exporting.timed_process import peak_memory
from anomaly_clip.methods import MuSc
from anomaly_clip.methods.image_features import ImageFeatures
from anomaly_clip.methods.mutual_scoring import mutual_scores, table_of_pairs, table_of_rows
from anomaly_clip.records import RANDOM

PARTS = ("scoring", "memory", "speed", "demo", "tiles")
SIDE, WIDTH, IMAGE_SIZE = 15, 896, 240
LAYER = 12
INTERVAL, K_LIST = (0, 0.3), [1, 2, 3]
CASES = ((64, 1, [1, 3, 5]), (64, 2, [3]), (200, 2, [3]))
"""Images, threads and sides of the neighbourhood of each measurement."""
FLOOR, GOAL = 0.40, 1 / 3
APART = 1e-4
"""Largest difference between the scores of both forms."""
MEMORY_IMAGES = 100
OVER = 1.10
"""Peak memory, as a multiple of features and table."""


def random_grids(n: int) -> Tensor:
    """Return float16 features ``(n, W, g, g)`` of similar images, with unit variance."""
    generator = np.random.default_rng(0)
    common = generator.standard_normal((1, WIDTH, SIDE, SIDE), dtype=np.float32)
    varied = generator.standard_normal((n, WIDTH, SIDE, SIDE), dtype=np.float32)
    return torch.from_numpy((0.6 * common + 0.8 * varied).astype(np.float16))


# -- the plain form --------------------------------------------------------------------------------


def plain_features(grids: Tensor, r: int) -> Tensor:
    """Return the unit features ``(n, N, W)`` by an average over unfolded neighbourhoods."""
    parts = []
    for grid in grids:
        standard = F.layer_norm(grid.float(), grid.shape)
        unfolded = F.unfold(standard[None], r, padding=r // 2)[0]  # (W * r * r, N)
        means = F.adaptive_avg_pool1d(unfolded.T[:, None], WIDTH)[:, 0]  # (N, W)
        parts.append(means / means.norm(dim=-1, keepdim=True))
    return torch.stack(parts)


def plain_mutual_scores(features: Tensor) -> Tensor:
    """Return the patch scores ``(n, N)``: each image is compared with a copy of all others."""
    n, num_patches, width = features.shape
    scores = []
    for i in range(n):
        others = torch.cat([features[:i], features[i + 1 :]]).reshape(-1, width)
        distances = torch.cdist(features[i], others).view(num_patches, n - 1, num_patches)
        nearest = distances.min(dim=-1)[0]  # (N, n - 1)
        ranked = nearest.topk(int(INTERVAL[1] * (n - 1)), dim=-1, largest=False)[0]
        scores.append(ranked.mean(dim=-1))
    return torch.stack(scores)


def plain_rescore(raw: Tensor, vectors: Tensor) -> Tensor:
    """Return the image scores ``(n,)`` by masked similarity matrices."""
    scaled = (raw - raw.min()) / (raw.max() - raw.min())
    similarity = vectors @ vectors.T
    scores = []
    for k in K_LIST:
        kept = torch.zeros_like(similarity)
        places = similarity.topk(k, dim=1).indices
        kept.scatter_(1, places, similarity.gather(1, places))
        scores.append(kept @ scaled / kept.sum(dim=1))
    return torch.stack(scores).mean(dim=0)


def plain_scoring(grids: Tensor, vectors: Tensor, r_list: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the patch scores ``(n, N)`` and image scores ``(n,)`` of one layer."""
    parts = [plain_mutual_scores(plain_features(grids, r)) for r in r_list]
    patches = torch.stack(parts).double().mean(dim=0).float()
    maps = F.interpolate(
        patches.view(-1, 1, SIDE, SIDE), IMAGE_SIZE, mode="bilinear", align_corners=True
    )
    return patches, plain_rescore(maps.flatten(1).amax(dim=1), vectors)


# -- the parts -------------------------------------------------------------------------------------


def scoring_case(n: int, threads: int, r_list: list[int]) -> dict[str, Any]:
    """Time both forms of the scoring of ``n`` images, and compare their scores."""
    torch.set_num_threads(threads)
    grids = random_grids(n)
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(n, 640, generator=generator) + 2, dim=1)
    halves = {"image": vectors.half(), "image_rest": (vectors - vectors.half().float()).half()}
    images = ImageFeatures({str(LAYER): grids, **halves}, torch.arange(n))
    backbone = CLIPBackbone.of(CLIPSettings("ViT-B-16-plus-240", RANDOM))
    method = MuSc(backbone, [LAYER], r_list, k_list=K_LIST)
    scores: dict[str, tuple[Tensor, Tensor]] = {}

    def ours() -> None:
        maps = method._patch_maps(images, range(n), 0)
        raw = method._raw_scores(maps)
        scores["ours"] = maps.flatten(1), method._image_scores(images, raw, range(n), 0)

    def plain() -> None:
        scores["plain"] = plain_scoring(grids, vectors, r_list)

    seconds = fastest(1, {"ours": ours, "plain": plain}, warm_up=0)
    pairs = zip(scores["ours"], scores["plain"], strict=True)
    apart = max(float((first - second).abs().max()) for first, second in pairs)
    return {
        "images": n,
        "threads": threads,
        "r_list": r_list,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "ratio": round(seconds["ours"] / seconds["plain"], 3),
        "apart": float(f"{apart:.1e}"),
    }


@torch.no_grad()
def scoring(*_: str) -> dict[str, Any]:
    """Compare our scoring with the plain form, and row blocks with pairs."""
    cases = [scoring_case(*case) for case in CASES]
    torch.set_num_threads(1)
    features = F.normalize(random_grids(64).float().flatten(2).mT, dim=-1).contiguous()
    tables: dict[str, Tensor] = {}
    tasks: dict[str, Callable[[], object]] = {
        "pairs": lambda: tables.update(pairs=table_of_pairs(features)),
        "rows": lambda: tables.update(rows=table_of_rows(features, range(64))),
    }
    seconds = fastest(1, tasks, warm_up=0)
    finite = tables["pairs"].isfinite()
    apart = (tables["pairs"][finite] - tables["rows"][finite]).abs().max()
    rows = {
        "images": 64,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times_of_pairs": round(seconds["rows"] / seconds["pairs"], 2),
        "apart": float(f"{apart:.1e}"),
    }
    return {"cases": cases, "row_blocks": rows}


def peak_of_scoring(n: int) -> dict[str, float]:
    """Return, in MiB, the peak memory that mutual scores add to this process, and the formula."""
    torch.set_num_threads(1)
    num_patches = SIDE * SIDE
    mutual_scores(F.normalize(torch.randn(3, num_patches, WIDTH), dim=-1))  # loads libraries
    before = peak_memory() or 0
    features = torch.randn(n, num_patches, WIDTH)
    features /= features.norm(dim=-1, keepdim=True)
    mutual_scores(features, room=1 << 40)
    added = (peak_memory() or 0) - before
    table = n * num_patches * n * 4
    return {
        "images": n,
        "peak_mib": round(added / 2**20, 1),
        "features_mib": round(features.numel() * 4 / 2**20, 1),
        "table_mib": round(table / 2**20, 1),
        "times": round(added / (features.numel() * 4 + table), 3),
    }


def memory(*_: str) -> dict[str, Any]:
    """Return the peak memory of the scoring, measured in a process of its own."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return dict(pool.apply(peak_of_scoring, (MEMORY_IMAGES,)))


def speed(*_: str) -> dict[str, Any]:
    """Return the processor time of new images, in milliseconds."""
    torch.set_num_threads(1)
    return {"processor_ms_of_an_image": sequences.milliseconds()}


def demo(*_: str) -> dict[str, Any]:
    """Return metrics on generated images."""
    return sequences.metrics_of_sequences(*sequences.demo())


def tiles(root: str, weights: str) -> dict[str, Any]:
    """Return metrics on photographs of magnetic tiles."""
    return sequences.metrics_of_sequences(*sequences.tiles(root, weights))


def bounds_of(parts: dict[str, Any]) -> dict[str, Bound]:
    """Return the bounds of the parts that were measured."""
    bounds: dict[str, Bound] = {}
    if "scoring" in parts:
        for case in parts["scoring"]["cases"]:
            name = f"{case['images']} images, {case['threads']} threads"
            bounds[f"time, of the plain form, {name}"] = at_most(case["ratio"], FLOOR, GOAL)
            bounds[f"scores apart, {name}"] = at_most(case["apart"], APART)
        bounds["row blocks apart"] = at_most(parts["scoring"]["row_blocks"]["apart"], APART)
    if "memory" in parts:
        bounds["peak memory, of features and table"] = at_most(parts["memory"]["times"], OVER)
    return bounds


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", help="folder of the magnetic tiles")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    arguments.add_argument("--folder", type=Path, help="folder to keep the parts in")
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    run: dict[str, Callable[[str, str], dict[str, Any]]]
    run = {"scoring": scoring, "memory": memory, "speed": speed, "demo": demo, "tiles": tiles}
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            file = folder / f"{name}.json"
            if not file.is_file():
                file.write_text(json.dumps(run[name](options.root, options.weights)))
            parts[name] = json.loads(file.read_text())
    return report("musc", parts, bounds_of(parts))


if __name__ == "__main__":
    sys.exit(main())
