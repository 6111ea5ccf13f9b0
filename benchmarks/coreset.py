"""Compare PatchCore's coreset with the plain choice on real photographs, and print one JSON line.

    python benchmarks/coreset.py DIR --weights squeezenet1_1_imagenet.safetensors

DIR holds the magnetic tiles in MVTec-AD's layout, ``--weights`` is a file with the weights of a
torchvision SqueezeNet. The patches are those of 150 normal images of 256 pixels, projected as
PatchCore does, and 10 % of them are selected. Times are processor seconds on one thread: those of
the whole choice over those of as many products of all patches with one vector, the minimum over
interleaved rounds. The plain choice, with one such product per centre, runs once in the same
process. Reported are the first difference of the two orders, how far the distances of the two
patches differ there, the covering radii, and the image AUROC with either bank. The first centres
are also compared in float64.

The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch
from common import Bound, at_least, at_most, fastest, parser, report
from torch import Tensor

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.data import MagneticTile
from anomaly_clip.methods import PatchCore
from anomaly_clip.methods.coreset import k_centre_greedy, project
from anomaly_clip.methods.patchcore import nearest_rows
from anomaly_clip.metrics.image import auroc
from anomaly_clip.progress import silence

__all__ = ["SHOTS", "SIDE", "detector", "image_aurocs", "tiles"]

SIDE, SHOTS, BATCH = 256, 150, 30
LAYERS = ["features.7", "features.10"]
START = 7
PRODUCTS = 50  # timed together
IN_FLOAT64 = 500  # centres compared
MOST_PRODUCTS, GOAL = 0.15, 0.08
NEARLY_EQUAL = 1e-5  # relative difference of distances within which float32 may choose otherwise
MOST_RADIUS = 1e-4


def tiles(root: str) -> MagneticTile:
    data = MagneticTile(
        root=root, image_size=SIDE, shots=SHOTS, seed=0, batch_size=BATCH, num_workers=0
    )
    data.setup("fit")
    data.setup("test")
    return data


def detector(weights: str, **options: Any) -> PatchCore:
    return PatchCore(
        CNNSettings("squeezenet1_1", weights), image_size=SIDE, layers=LAYERS, **options
    )


def plain_k_centres(points: Tensor, count: int, start: int) -> Tensor:
    """Return greedy centres by one product of all points with a vector per centre."""
    points = points - points.mean(dim=0)
    lengths = points.square().sum(dim=1)
    nearest = torch.full_like(lengths, torch.inf)
    chosen = torch.empty(count, dtype=torch.int64)
    at = start
    for number in range(count):
        chosen[number] = at
        distance = torch.addmv(lengths, points, points[at], alpha=-2)
        torch.minimum(nearest, distance.add_(lengths[at]), out=nearest)
        nearest[at] = -torch.inf
        at = int(nearest.argmax())
    return chosen


def first_difference(ours: Tensor, plain: Tensor) -> int | None:
    differ = (ours != plain).nonzero()
    return int(differ[0]) if len(differ) else None


def covering_radius(points: Tensor, centres: Tensor) -> float:
    """Return the largest distance, in float64, of a point from its nearest centre."""
    _, rows = nearest_rows(points, points[centres])
    differences = points.double() - points[centres[rows]].double()
    return float(torch.linalg.vector_norm(differences, dim=1).max())


@torch.no_grad()
def image_aurocs(method: PatchCore, data: MagneticTile, banks: list[Tensor]) -> list[float]:
    """Return the image AUROC of the test images with each bank."""
    scores: list[list[Tensor]] = [[] for _ in banks]
    labels = []
    for batch in data.test_dataloader():
        features = method.embed(batch["image"])
        labels.append(batch["label"])
        for bank, parts in zip(banks, scores, strict=True):
            method.bank = bank
            distances, rows = nearest_rows(features.flatten(0, 1), bank)
            shape = features.shape[:2]
            parts.append(method.image_scores(features, distances.view(shape), rows.view(shape)))
    label = torch.cat(labels)
    return [round(auroc(torch.cat(parts), label), 4) for parts in scores]


@torch.no_grad()
def compare_orders(root: str, weights: str, rounds: int) -> tuple[dict[str, Any], dict[str, Bound]]:
    """Time the choice and compare its order with the plain one."""
    data, method = tiles(root), detector(weights)
    batches = data.train_dataloader()
    patches = torch.cat([method.embed(batch["image"]).flatten(0, 1) for batch in batches])
    points = project(patches, 0)
    count = method.num_kept(len(points))
    vector = points[0].clone()
    orders: dict[str, Tensor] = {}

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mv(points, vector)

    def choose() -> None:
        orders["blocks"] = k_centre_greedy(points, count, START)

    seconds = fastest(rounds, {"products": products, "choice": choose}, warm_up=0)
    began = time.process_time()
    orders["plain"] = plain_k_centres(points, count, START)
    plain_seconds = time.process_time() - began
    product = min(seconds["products"], fastest(1, {"": products})[""]) / PRODUCTS
    at = first_difference(orders["blocks"], orders["plain"])
    apart = 0.0
    if at is not None:
        others = points[torch.stack([orders["blocks"][at], orders["plain"][at]])].double()
        pair = torch.cdist(others, points[orders["plain"][:at]].double()).amin(dim=1)
        apart = float(1 - pair.min() / pair.max())
    sets = {name: tuple(sorted(order.tolist())) for name, order in orders.items()}
    different = list(dict.fromkeys(sets.values()))  # the same patches in another order are one bank
    radii = {centres: covering_radius(points, torch.tensor(centres)) for centres in different}
    aurocs = image_aurocs(method, data, [patches[list(centres)] for centres in different])
    by_centres = dict(zip(different, aurocs, strict=True))
    cost = seconds["choice"] / count / product
    values = {
        "patches": len(patches),
        "width": len(vector),
        "centres": count,
        "rounds": rounds,
        "product_ms": round(1e3 * product, 3),
        "choice_seconds": round(seconds["choice"], 2),
        "plain_choice_seconds": round(plain_seconds, 2),
        "products_per_centre": {
            "blocks": round(cost, 4),
            "plain": round(plain_seconds / count / product, 4),
        },
        "first_difference": at,
        "relative_difference_of_distances_there": apart,
        "centres_of_both": len(set(sets["blocks"]) & set(sets["plain"])),
        "covering_radius": {name: radii[centres] for name, centres in sets.items()},
        "image_auroc": {name: by_centres[centres] for name, centres in sets.items()},
    }
    exact = points.double()
    in_float64 = first_difference(
        k_centre_greedy(exact, IN_FLOAT64, START), plain_k_centres(exact, IN_FLOAT64, START)
    )
    radius = abs(radii[sets["blocks"]] / radii[sets["plain"]] - 1)
    bounds = {
        "products per centre": at_most(cost, MOST_PRODUCTS, GOAL),
        "relative difference of distances at the first difference": at_most(apart, NEARLY_EQUAL),
        "relative difference of covering radii": at_most(radius, MOST_RADIUS),
        f"equal centres of {IN_FLOAT64} in float64": at_least(
            IN_FLOAT64 if in_float64 is None else in_float64, IN_FLOAT64
        ),
    }
    return values, bounds


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", help="folder of the magnetic tiles")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    arguments.add_argument("--rounds", type=int, default=2)
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    silence(True)
    torch.set_num_threads(1)
    values, bounds = compare_orders(options.root, options.weights, options.rounds)
    return report("coreset", {"images": SHOTS, "side": SIDE, **values}, bounds)


if __name__ == "__main__":
    sys.exit(main())
