"""Time detectors and the bare networks they consist of, and print one JSON line.

    python benchmarks/detectors.py
    python benchmarks/detectors.py --only rd4ad

The input is 200 images of 256 pixels, the network a ResNet-18 with random weights. Times are
processor seconds on one thread, the minimum over interleaved rounds. The baselines are:

- For PaDiM's fit and test, the forward pass of torchvision's own network up to layer 3 on
  normalised pixels. The fit is a Lightning run from uint8 images to Gaussians, the test one from
  uint8 images to maps and all metrics.
- For PaDiM's embedding and distances, their plain form: all channels are upsampled before some are
  chosen, and each position has a matrix product of its own. The features must be equal, and the
  distances, too, but for rounding.
- For the memory of PaDiM's fit to many images, the memory of a fit to few. Each fit is measured in
  a separate process.
- For a training step of RD4AD, the forward pass of the same teacher, bottleneck and student, and
  the backward pass from the mean of the outputs, on normalised pixels, without loss and optimiser.

The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from common import Bound, at_least, at_most, fastest, parser, report
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.methods import RD4AD, PaDiM
from anomaly_clip.metrics.evaluator import Evaluator
from anomaly_clip.records import RANDOM, Batch, Scores

IMAGES, SIDE, BATCH = 200, 256, 20
FEW, MANY = 200, 800  # images of the two fits whose memory is compared
STEPS, STEP_BATCH = 3, 16  # training steps of RD4AD, and their batch size
BOUNDS = {"fit": 1.2, "test": 1.15, "memory": 1.02, "scoring": 0.5, "rd4ad_step": 1.10}
GOALS = {"fit": 1.15, "test": 1.1}
ROUNDING = 1e-6  # relative difference of distances
PARTS = ("memory", "padim", "scoring", "rd4ad")


def squares(batch: int) -> Tensor:
    """Return the masks of a batch, every second one with a square."""
    masks = torch.zeros(batch, SIDE, SIDE, dtype=torch.bool)
    masks[1::2, 64:128, 64:128] = True
    return masks


class NoiseBatches(IterableDataset[Batch]):
    """Batches of noise, generated on the fly so that they occupy no memory."""

    def __init__(self, count: int, batch: int = BATCH) -> None:
        self.count = count
        self.batch = batch

    def __len__(self) -> int:
        return self.count // self.batch

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        batch = self.batch
        for number in range(len(self)):
            shape = (batch, 3, SIDE, SIDE)
            yield Batch(
                image=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                label=torch.arange(batch) % 2 == 1,
                category=["noise"] * batch,
                path=[f"{number}-{row}" for row in range(batch)],
                index=torch.arange(number * batch, (number + 1) * batch),
                mask=squares(batch),
            )


class TestedPaDiM(PaDiM):
    """PaDiM that is tested in its prediction loop, as Lightning's test needs a data module."""

    def on_predict_start(self) -> None:
        """Reset the metrics."""
        self.evaluator = Evaluator(["noise"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch and update the metrics."""
        return self.test_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        """Compute the metrics."""
        self.results = self.evaluator.compute()


def trainer() -> Trainer:
    """Return a trainer without logging, checkpoints and progress bars."""
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def padim(backbone: CNNBackbone | CNNSettings) -> PaDiM:
    return TestedPaDiM(backbone, image_size=SIDE)


def settings() -> CNNSettings:
    return CNNSettings("resnet18", RANDOM, ["layer1", "layer2", "layer3"])


@torch.no_grad()
def forward(network: Any, pixels: list[Tensor]) -> None:
    """Run the network up to layer 3 over all batches."""
    for batch in pixels:
        stem = network.maxpool(network.relu(network.bn1(network.conv1(batch))))
        network.layer3(network.layer2(network.layer1(stem)))


def time_padim(rounds: int) -> dict[str, float]:
    """Return the seconds of the bare forward pass, the fit and the test."""
    from torchvision.models import resnet18

    backbone = CNNBackbone.of(settings())
    batches = list(NoiseBatches(IMAGES))
    pixels = [backbone.normalise(batch["image"]) for batch in batches]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    fitted = padim(backbone)

    def fit() -> None:
        trainer().fit(fitted, loader)

    def test() -> None:
        trainer().predict(fitted, loader, return_predictions=False)

    network = resnet18(weights=None).eval()
    bare = partial(forward, network, pixels)
    return fastest(rounds, {"forward": bare, "fit": fit, "test": test})


def peak_of_fit(count: int) -> float:
    """Return the peak memory, in MiB, of this process after a fit to ``count`` images."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    trainer().fit(padim(settings()), DataLoader(NoiseBatches(count), batch_size=None))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plain_features(method: PaDiM, features: Mapping[str, Tensor]) -> Tensor:
    """Return the embedding by its definition, from all upsampled channels."""
    size = features["layer1"].shape[-2:]
    maps = [F.interpolate(features[layer], size, mode="nearest") for layer in method.layers]
    return torch.cat(maps, dim=1).flatten(2)[:, method.channels].mT


def plain_distances(method: PaDiM, features: Tensor) -> Tensor:
    """Return the distances by their definition, position by position."""
    places = enumerate(zip(method.mean, method.factor, strict=True))
    return torch.stack(
        [((features[:, i] - mean) @ factor.T).norm(dim=1) for i, (mean, factor) in places], dim=1
    )


@torch.no_grad()
def time_scoring(rounds: int) -> dict[str, Any]:
    """Time embedding and distances of one batch, without the network, and compare the values."""
    method = padim(settings())
    (batch,) = NoiseBatches(BATCH)
    features = method.backbone(batch["image"])
    method.backbone.feature_maps = lambda images, layers: list(features.values())  # type: ignore
    shape = (64 * 64, len(method.channels))
    method.mean, method.factor = torch.randn(shape), torch.randn(*shape, shape[1]).tril()
    embedded = method.embed(batch["image"])
    plain = plain_distances(method, embedded)
    tasks = {
        "plain": lambda: plain_distances(method, plain_features(method, features)),
        "ours": lambda: method.distances(method.embed(batch["image"])),
    }
    seconds = fastest(rounds, tasks)
    return {
        "ms_per_batch": {name: round(1e3 * value, 1) for name, value in seconds.items()},
        "times": round(seconds["ours"] / seconds["plain"], 3),
        "same_features": embedded.equal(plain_features(method, features)),
        "distances_apart": float(((method.distances(embedded) - plain) / plain).abs().max()),
    }


def time_step(rounds: int) -> dict[str, float]:
    """Return the seconds of RD4AD's steps and of its bare networks."""
    method = RD4AD(settings(), image_size=SIDE)
    batches = list(NoiseBatches(STEPS * STEP_BATCH, STEP_BATCH))
    pixels = [method.backbone.normalise(batch["image"]) for batch in batches]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def bare() -> None:
        method.train()
        for batch in pixels:
            with torch.no_grad():
                teacher = list(method.backbone.features(batch).values())
            student = method.student(method.bottleneck(teacher))
            method.zero_grad()
            torch.stack([level.mean() for level in student]).sum().backward()

    return fastest(rounds, {"bare": bare, "steps": lambda: trainer().fit(method, loader)})


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = arguments.parse_args()
    rounds = options.rounds
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    ratios: dict[str, float] = {}
    parts: dict[str, Any] = {}
    if "memory" in options.only:
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            few, many = (pool.apply(peak_of_fit, (count,)) for count in (FEW, MANY))
        ratios["memory"] = many / few
        parts["padim_peak_mib"] = {f"{FEW} images": round(few), f"{MANY} images": round(many)}
    torch.set_num_threads(1)
    if "padim" in options.only:
        seconds = time_padim(rounds)
        ratios["fit"] = seconds["fit"] / seconds["forward"]
        ratios["test"] = seconds["test"] / seconds["forward"]
        parts["padim_seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    equality: dict[str, Bound] = {}
    if "scoring" in options.only:
        scoring = parts["padim_scoring"] = time_scoring(rounds)
        ratios["scoring"] = scoring["times"]
        equality["features equal to the plain ones"] = at_least(int(scoring["same_features"]), 1)
        apart = "distances apart from the plain ones"
        equality[apart] = at_most(scoring["distances_apart"], ROUNDING)
    if "rd4ad" in options.only:
        seconds = time_step(rounds)
        ratios["rd4ad_step"] = seconds["steps"] / seconds["bare"]
        parts["rd4ad_seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    values = {
        "backbone": "resnet18, random weights",
        "images": IMAGES,
        "side": SIDE,
        "rounds": rounds,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        **parts,
    }
    bounds = {name: at_most(v, BOUNDS[name], GOALS.get(name)) for name, v in ratios.items()}
    return report("detectors", values, {**equality, **bounds})


if __name__ == "__main__":
    sys.exit(main())
