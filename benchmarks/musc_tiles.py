"""Score real photographs with MuSc, without normal images or prompts, and print one JSON line.

    python benchmarks/musc_tiles.py DIR --weights squeezenet1_1_imagenet.safetensors \
        --brain DIR --head DIR

DIR holds the magnetic tiles in MVTec-AD's layout. The 577 test images are split into two halves by
tile: images are sorted by the number in their names, a gap above 500 starts a new group, and the
groups are shuffled per kind of defect with seed 22 and dealt out. All settings of a grid are tried
on the first half. The one with the highest mean of image and pixel AUROC (``CHOSEN``) was then
measured on the second half, as were PatchCore (150 normal training images), SDP, and MuSc on random
weights. ``shares`` scores 100 images of the second half at a time, of which 5, 20 and 67 % are
anomalous. Brain MRI and Head CT are scored with the same setting. ``--folder`` keeps the results of
all parts, so that an interrupted run continues. The exit status is 1 if MuSc misses its goal, an
image AUROC of 0.75 on the second half.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import at_least, parser, report
from lightning import Callback, Trainer
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPSettings, unit
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.data import AnomalyData, BrainMRI, HeadCT, MagneticTile
from anomaly_clip.data.samples import Sample
from anomaly_clip.maps import image_score, resize_maps
from anomaly_clip.methods import SDP, MuSc, PatchCore
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.musc_images import resize_grids
from anomaly_clip.methods.mutual_scoring import (
    aggregate,
    mean_of_nearest,
    rescore,
    table_of_pairs,
)
from anomaly_clip.metrics import PixelHistogram
from anomaly_clip.metrics.image import auroc

GOAL = 0.75
"""Image AUROC on the second half."""
SEED, GAP = 22, 500
GRID = torch.Size((15, 15))
MASKS = 256
"""Side at which the maps of all methods are compared with the masks, in pixels."""
BATCH = 16
RANDOM_SEEDS = (0, 1, 2)
IMAGES, DRAWS, SHARES = 100, 20, (0.05, 0.2, 0.67)
NUM_FITTED = 150
METRICS = ("image_auroc", "pixel_auroc", "pixel_pro")

LAYERS = ("features.4", "features.7", "features.10", "features.12")
SEARCHED = ((256, LAYERS), (384, ("features.7",)))
"""Image sizes, and the layers tried with each."""
SIDES = (1, 3, 5)
INTERVALS = ((0, 0.1), (0, 0.3), (0, 0.5), (0.05, 0.3), (0.1, 0.5), (0, 1.0), (0.3, 0.7))
K_LISTS = ((0,), (1, 2, 3), (1, 8, 9))


@dataclass(frozen=True)
class Setting:
    """Options of MuSc; see there."""

    image_size: int = 256
    layers: tuple[str, ...] = ("features.4", "features.7", "features.10")
    r_list: tuple[int, ...] = (1, 3, 5)
    interval: tuple[float, float] = (0, 0.3)
    k_list: tuple[int, ...] = (1, 2, 3)

    def options(self) -> dict[str, Any]:
        """Return the options of MuSc that do not depend on the backbone."""
        lists = {name: list(getattr(self, name)) for name in ("r_list", "interval", "k_list")}
        return {**lists, "grid": None}


PUBLISHED = Setting()
"""The published scoring; its layers are ours, as the paper has no CNN."""
CHOSEN = Setting(384, ("features.7",), (1,), (0, 0.3), (0,))
"""The best setting of the search on the first half."""


# -- data ------------------------------------------------------------------------------------------


def number(sample: Sample) -> int:
    """Return the running number of a photograph: nearby numbers may show the same tile."""
    match = re.search(r"num_(\d+)", sample.image.name)
    assert match is not None, sample.image
    return int(match[1])


def kind(sample: Sample) -> str:
    """Return the kind of defect, or good."""
    return sample.image.parent.name


def tile_groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield groups of images that may show the same tile."""
    group: list[Sample] = []
    for sample in sorted(samples, key=number):
        if group and number(sample) - number(group[-1]) > GAP:
            yield group
            group = []
        group.append(sample)
    yield group


def halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return two halves without a common tile, and with similar numbers of each kind."""
    by_kind: dict[str, list[list[Sample]]] = {}
    for group in tile_groups(samples):
        most_common = Counter(sorted(map(kind, group))).most_common(1)[0][0]
        by_kind.setdefault(most_common, []).append(group)
    draw, parts, place = random.Random(SEED), ([], []), 0  # type: ignore[var-annotated]
    for name in sorted(by_kind):
        draw.shuffle(by_kind[name])
        for group in by_kind[name]:
            parts[place % 2].extend(group)
            place += 1
    return sorted(parts[0], key=by_path), sorted(parts[1], key=by_path)


def by_path(sample: Sample) -> str:
    """Return the key of the order of a listing."""
    return str(sample.image)


def linked(samples: Sequence[Sample], root: Path, target: Path) -> Path:
    """Return a data set that has some test images of another one, and its training images."""
    category = target / MagneticTile(root=str(root)).categories[0]
    category.mkdir(parents=True)
    (category / "train").symlink_to((root / category.name / "train").resolve())
    for sample in samples:
        for file, split in ((sample.image, "test"), (sample.mask, "ground_truth")):
            if file is not None:
                folder = category / split / kind(sample)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file.name).symlink_to(Path(file).resolve())
    return target


# -- metrics ---------------------------------------------------------------------------------------


def metrics_by_kind(
    scores: Tensor, kinds: Sequence[str], maps: Tensor | None = None, masks: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Return the metrics of all images, and of each kind of defect against all normal images.

    Args:
        scores: Image scores ``(n,)``.
        kinds: Kind of each image.
        maps: ``(n, S, S)``; None: image AUROC only.
        masks: bool ``(n, S, S)``.
    """
    names = sorted(set(kinds) - {"good"})
    result = {}
    for name in ["all", *names] if len(names) > 1 else ["all"]:
        chosen = torch.tensor([name == "all" or other in (name, "good") for other in kinds])
        label = torch.tensor([other != "good" for other in kinds])[chosen]
        result[name] = {"image_auroc": round(auroc(scores[chosen], label), 4)}
        if maps is not None and masks is not None:
            pixels = PixelHistogram()
            pixels.update(maps[chosen], masks[chosen])
            values = pixels.compute()[0].metrics
            for metric in METRICS[1:]:
                value = values[metric]
                assert value is not None
                result[name][metric] = round(value, 4)
    return result


class Outputs(Callback):
    """Collects the maps of a test at the size of the masks."""

    def __init__(self) -> None:
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}
        """Map and mask of each image, by index."""

    def on_test_batch_end(  # noqa: D102
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if "mask" in batch:
            maps = outputs["anomaly_map"].float()
            rows = zip(batch["index"].tolist(), maps, batch["mask"], strict=True)
            self.maps |= {index: (scores, mask) for index, scores, mask in rows}


def evaluated(method: AnomalyMethod, data: AnomalyData, fits: bool = False) -> dict[str, Any]:
    """Test a method, after a fit if asked for; return its metrics and the seconds it took."""
    outputs, started = Outputs(), time.perf_counter()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[outputs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if fits:
        trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    seconds = time.perf_counter() - started
    final = method.final_scores()
    samples = data.samples("test")
    scores = torch.tensor([final[index] for index in range(len(samples))])
    if not outputs.maps:
        kinds = ["defect" if sample.label else "good" for sample in samples]
        return {**metrics_by_kind(scores, kinds), "seconds": round(seconds, 1)}
    maps, masks = (torch.stack(list(part)) for part in zip(*_ordered(outputs.maps), strict=True))
    values = metrics_by_kind(scores, [kind(sample) for sample in samples], maps, masks)
    return {**values, "seconds": round(seconds, 1)}


def _ordered(maps: Mapping[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [maps[index] for index in sorted(maps)]


# -- scores from tables, for the search and the draws --------------------------------------------


@torch.inference_mode()
def encoded(
    backbone: CNNBackbone, data: MagneticTile, samples: Sequence[Sample]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features ``(n, C, 15, 15)`` of each layer in half precision, and the masks."""
    images = data.as_tensors(samples)
    parts: dict[str, list[Tensor]] = {}
    masks = []
    for start in range(0, len(samples), BATCH):
        items = [images[row] for row in range(start, min(start + BATCH, len(samples)))]
        features = backbone(torch.stack([item["image"] for item in items]))
        for layer, grids in features.items():
            parts.setdefault(layer, []).append(resize_grids(grids.float(), GRID).half())
        masks += [item["mask"] for item in items]
    return {layer: torch.cat(grids) for layer, grids in parts.items()}, torch.stack(masks)


def class_vectors(grids: Tensor) -> Tensor:
    """Return the class vectors ``(n, C)`` of MuSc on a CNN: means of the last layer."""
    return unit(grids.float().mean(dim=(2, 3)))


def searched(samples: Sequence[Sample], root: str, weights: str) -> dict[str, Any]:
    """Return the mean of image and pixel AUROC of the settings of the grid.

    The pixel AUROC is that of patches, which are anomalous with any anomalous pixel; the image
    score is the highest patch score, before the map is enlarged.
    """
    label = torch.tensor([sample.label for sample in samples]) > 0
    backbone = CNNBackbone("squeezenet1_1", weights, LAYERS)
    rows: list[tuple[dict[str, float], Setting]] = []
    for size, names in SEARCHED:
        data = MagneticTile(root=root, image_size=size)
        grids, masks = encoded(backbone, data, samples)
        patches = F.adaptive_max_pool2d(masks.float(), GRID).flatten() > 0
        maps: dict[tuple[str, int, tuple[float, float]], Tensor] = {}
        for layer, r in product(names, SIDES):
            table = table_of_pairs(aggregate(grids[layer], r))  # (n, N, n)
            for interval in INTERVALS:
                maps[layer, r, interval] = mean_of_nearest(table, interval, len(samples) - 1)
            sys.stderr.write(f"{size} {layer} {r}\n")
        for layers, r_list, interval in product(_subsets(names), _subsets(SIDES), INTERVALS):
            parts = [maps[layer, r, interval] for layer, r in product(layers, r_list)]
            scores = torch.stack(parts).mean(dim=0)  # (n, N)
            pixel, vectors = auroc(scores.flatten(), patches), class_vectors(grids[layers[-1]])
            for k_list in K_LISTS:
                image = auroc(rescore(scores.amax(dim=1), vectors, k_list), label)
                values = {"mean": (image + pixel) / 2, "image_auroc": image, "pixel_auroc": pixel}
                values = {name: round(value, 4) for name, value in values.items()}
                rows.append((values, Setting(size, layers, r_list, interval, k_list)))
    rows.sort(key=lambda row: -row[0]["mean"])
    options = ("image_size", "layers", "r_list", "interval", "k_list")
    return {
        "images": len(samples),
        "settings": len(rows),
        "best": [{**values, **asdict(setting)} for values, setting in rows[:10]],
        "published": next(values for values, setting in rows if setting == PUBLISHED),
        "by_option": {option: _by_value(rows, attrgetter(option)) for option in options},
    }


def _subsets(values: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [part for n in range(1, len(values) + 1) for part in combinations(values, n)]


def _by_value(
    rows: Sequence[tuple[dict[str, float], Setting]], value_of: Callable[[Setting], object]
) -> dict[str, dict[str, float]]:
    """Return the best and the average result of each value of an option."""
    groups: dict[str, list[float]] = {}
    for values, setting in rows:
        groups.setdefault(str(value_of(setting)), []).append(values["mean"])
    return {
        name: {"best": max(means), "average": round(sum(means) / len(means), 4)}
        for name, means in groups.items()
    }


def shares(samples: Sequence[Sample], root: str, weights: str, setting: Setting) -> dict[str, Any]:
    """Return the metrics of draws of images with several shares of anomalous ones."""
    backbone = CNNBackbone("squeezenet1_1", weights, setting.layers)
    data = MagneticTile(root=root, image_size=setting.image_size, mask_size=MASKS)
    grids, masks = encoded(backbone, data, samples)
    label = torch.tensor([sample.label for sample in samples]) > 0
    draws = {(share, seed): drawn(label, share, seed) for share in SHARES for seed in range(DRAWS)}
    totals = {draw: torch.zeros(IMAGES, GRID.numel()) for draw in draws}
    combined = list(product(setting.layers, setting.r_list))
    for layer, r in combined:
        table = table_of_pairs(aggregate(grids[layer], r))  # (n, N, n)
        for draw, rows in draws.items():
            part = table[rows][:, :, rows]
            totals[draw] += mean_of_nearest(part, setting.interval, IMAGES - 1) / len(combined)
    vectors = class_vectors(grids[setting.layers[-1]])
    values: dict[float, list[dict[str, float]]] = {share: [] for share in SHARES}
    for (share, seed), rows in draws.items():
        maps = resize_maps(
            totals[share, seed].unflatten(1, GRID), (MASKS, MASKS), align_corners=True
        )
        scores = rescore(image_score(maps), vectors[rows], setting.k_list)
        kinds = ["defect" if label[row] else "good" for row in rows]
        values[share].append(metrics_by_kind(scores, kinds, maps, masks[rows])["all"])
    return {f"{share:.0%}": summary(rows) for share, rows in values.items()}


def drawn(label: Tensor, share: float, seed: int) -> Tensor:
    """Return the indices ``(IMAGES,)`` of a draw with a share of anomalous images."""
    generator = torch.Generator().manual_seed(seed)
    anomalous = round(share * IMAGES)
    rows = []
    for indices, count in ((label.nonzero(), anomalous), ((~label).nonzero(), IMAGES - anomalous)):
        indices = indices.squeeze(1)
        rows.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
    return torch.cat(rows).sort().values


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, minimum and maximum of each metric."""
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean = round(sum(values) / len(values), 4)
        result[name] = {"mean": mean, "lowest": min(values), "highest": max(values)}
    return result


# -- the rows of the comparison ------------------------------------------------------------------


def musc(weights: str, setting: Setting, seed: int = 0) -> MuSc:
    """Return MuSc on a SqueezeNet; random weights depend on the seed."""
    torch.manual_seed(seed)
    return MuSc(
        CNNSettings("squeezenet1_1", weights),
        list(setting.layers),
        image_size=setting.image_size,
        **{**setting.options(), "grid": GRID[0]},
    )


def musc_on_clip(setting: Setting) -> MuSc:
    """Return MuSc on the demo CLIP: its own layers and grid, and the setting of the scoring."""
    return MuSc(CLIPSettings(pretrained="demo"), **setting.options())


def sdp() -> SDP:
    """Return SDP with the settings of ``configs/demo.yaml``."""
    return SDP(CLIPSettings("demo", "demo", 160), sigma=5.3)


def patchcore(weights: str) -> PatchCore:
    """Return PatchCore with the settings of ``benchmarks/magnetic_tile.py``."""
    return PatchCore(CNNSettings("squeezenet1_1", weights), 224, ["features.7", "features.10"])


def compared(root: str, weights: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the tests on the second half, by name."""

    def tested(method: AnomalyMethod, **more: Any) -> dict[str, Any]:
        size = method.image_size
        data = MagneticTile(
            root=root, image_size=size, mask_size=MASKS, batch_size=BATCH, seed=0, **more
        )
        return evaluated(method, data, bool(more))

    tests: dict[str, Callable[[], dict[str, Any]]] = {
        "MuSc, ImageNet": lambda: tested(musc(weights, CHOSEN)),
        "MuSc, ImageNet, published scoring": lambda: tested(musc(weights, PUBLISHED)),
        "PatchCore, ImageNet": lambda: tested(patchcore(weights), shots=NUM_FITTED),
        "SDP, demo CLIP": lambda: tested(sdp()),
        "MuSc, demo CLIP": lambda: tested(musc_on_clip(CHOSEN)),
    }
    for seed in RANDOM_SEEDS:
        name = f"MuSc, random {seed}"
        tests[name] = lambda seed=seed: tested(musc("random", CHOSEN, seed))  # type: ignore[misc]
    return tests


def medical(
    data_of: Callable[..., AnomalyData], weights: str
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the tests on a medical data set, by name."""

    def tested(method: AnomalyMethod) -> dict[str, Any]:
        return evaluated(method, data_of(image_size=method.image_size, batch_size=BATCH))

    return {
        "MuSc, ImageNet": lambda: tested(musc(weights, CHOSEN)),
        **{
            f"MuSc, random {seed}": lambda seed=seed: tested(musc("random", CHOSEN, seed))  # type: ignore[misc]
            for seed in RANDOM_SEEDS
        },
        "MuSc, demo CLIP": lambda: tested(musc_on_clip(CHOSEN)),
        "SDP, demo CLIP": lambda: tested(sdp()),
    }


def kept(folder: Path | None, name: str, task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a part of the benchmark; read it if an earlier run has kept it."""
    file = None if folder is None else folder / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    if file is not None and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    result = task()
    sys.stderr.write(f"{name}: {json.dumps(result.get('all', result))[:300]}\n")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result), encoding="utf-8")
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the benchmark."""
    root, weights, folder = str(options.root), options.weights, options.folder
    first, second = halves(MagneticTile(root=root).samples("test"))
    values: dict[str, Any] = {
        "halves": [dict(sorted(Counter(map(kind, part)).items())) for part in (first, second)],
        "search": kept(folder, "search", lambda: searched(first, root, weights)),
        "chosen": asdict(CHOSEN),
        "published": asdict(PUBLISHED),
    }
    with tempfile.TemporaryDirectory() as scratch:
        tests = compared(str(linked(second, options.root, Path(scratch))), weights)
        values["runs"] = {name: kept(folder, f"tiles {name}", tests[name]) for name in tests}
    values["shares"] = kept(folder, "shares", lambda: shares(second, root, weights, CHOSEN))
    for name, source, place in (
        ("brain_mri", BrainMRI, options.brain),
        ("head_ct", HeadCT, options.head),
    ):
        if place is not None:
            tests = medical(_with_root(source, place), weights)
            values[name] = {test: kept(folder, f"{name} {test}", tests[test]) for test in tests}
    return values


def _with_root(source: type[AnomalyData], root: Path) -> Callable[..., AnomalyData]:
    return lambda **options: source(root=str(root), **options)


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("root", type=Path, help="folder of the magnetic tiles")
    arguments.add_argument("--weights", default="imagenet", help="SqueezeNet: file or imagenet")
    arguments.add_argument("--brain", type=Path, help="folder of Brain MRI")
    arguments.add_argument("--head", type=Path, help="folder of Head CT")
    arguments.add_argument("--folder", type=Path, help="folder to keep results in")
    options = arguments.parse_args()
    warnings.filterwarnings("ignore")
    values = run(options)
    reached = values["runs"]["MuSc, ImageNet"]["all"]["image_auroc"]
    bounds = {"goal: image AUROC of MuSc on the second half": at_least(reached, GOAL)}
    return report("musc_tiles", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
