"""Runs of RegAD on tiny data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from helpers import save_picture

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.methods import RegAD
from anomaly_clip.methods.regad import PixelCNNSettings


def words(verb: str, root: Path, runs: Path, *more: str) -> list[str]:
    line = [verb, "--model", "RegAD", "--model.backbone.weights", "random"]
    line += ["--model.image_size", "64", "--model.shots", "2", "--model.rounds", "2"]
    line += ["--model.lr", "0.01"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    line += ["--data.train_categories", "others", "--data.batch_size", "4"]
    line += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    line += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    return [*line, "--output.root", str(runs), *more]


ONE = ("--data.categories", "[bottle]")


def three_categories(mvtec_root: Path) -> Path:
    """Extend a folder to three categories with four training images each, and return it."""
    rng = np.random.default_rng(0)

    def save_noise(name: str) -> None:
        save_picture(mvtec_root / name, rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))

    for number in range(4):
        save_noise(f"cable/train/good/{number}.png")
        if number < 2:
            save_noise(f"bottle/train/good/{100 + number}.png")
            save_noise(f"metal_nut/train/good/{100 + number}.png")
            save_noise(f"cable/test/good/{number}.png")
            save_noise(f"cable/test/cut/{number}.png")
            mask = np.zeros((40, 40), np.uint8)
            mask[5:20, 8:30] = 255
            save_picture(mvtec_root / "cable" / "ground_truth" / "cut" / f"{number}_mask.png", mask)
    return mvtec_root


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: in many small matrix products, several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixel_cnn() -> CNNBackbone:
    """Return RegAD's default ResNet with random weights, the same each time."""
    torch.manual_seed(0)
    return CNNBackbone.of(PixelCNNSettings(weights="random"))


def trained_regad(backbone: CNNBackbone) -> RegAD:
    """Return a RegAD marked as trained, with non-trivial transforms and two references of "a"."""
    method = RegAD(backbone, image_size=64, shots=2).eval()
    method.trained.fill_(True)
    for transformer in method.network.transformers:
        transformer.look[-1].bias.data += torch.tensor([0.2, 0.1, -0.1])  # type: ignore[index,union-attr]
    rng = np.random.default_rng(0)
    method.remember(torch.from_numpy(rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)), "a")
    return method
