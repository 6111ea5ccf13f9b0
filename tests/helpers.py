"""Helpers shared by several test files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.methods import SDPPlus
from anomaly_clip.methods.feature_method import FittedMethod

SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 48,
        "patch_size": 8,
        "layers": 4,
        "width": 24,
        "head_width": 12,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
"""Configuration of a CLIP that is fast to train."""

TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


WORDS = PromptEnsemble(["{}", "good {}"], ["bad {}"], ["a {}.", "the {}."])


MEAN = RVSSettings("mean")


Fitted = TypeVar("Fitted", bound=FittedMethod)


@dataclass(frozen=True)
class Golden:
    """Reference arrays of one official implementation."""

    folder: Path

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the expected tensors whose names begin with a prefix, by the rest of the name."""
        tensors = {k[len(prefix) :]: v for k, v in self.expected.items() if k.startswith(prefix)}
        assert tensors, f"no golden tensor is named {prefix}..."
        return tensors


def save_picture(path: Path, array: np.ndarray | None = None, *, size: int = 40) -> Path:
    """Save an array, or a grey ramp, as an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        ramp = np.linspace(0, 255, size, dtype=np.uint8)
        array = np.repeat(np.tile(ramp, (size, 1))[..., None], 3, axis=2)
    Image.fromarray(array).save(path)
    return path


def write_mvtec(folder: Path) -> Path:
    """Write two categories in MVTec-AD's layout: 2 train, 2 normal and 2 anomalous test images."""
    rng = np.random.default_rng(0)
    root = folder / "mvtec"
    for category in ("bottle", "metal_nut"):
        for name in ("train/good/000", "train/good/001", "test/good/000", "test/good/001"):
            save_picture(root / category / f"{name}.png", _noise(rng))
        for number in ("000", "001"):
            save_picture(root / category / "test" / "scratch" / f"{number}.png", _noise(rng))
            mask = np.zeros((40, 48), dtype=np.uint8)
            mask[8:20, 10:30] = 255
            save_picture(root / category / "ground_truth" / "scratch" / f"{number}_mask.png", mask)
    return root


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)


def near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Assert that values differ by at most a fraction of the largest expected value."""
    largest = float(expected.abs().max())
    assert_close(actual.double(), expected.double(), atol=relative * largest, rtol=0)


def quiet_trainer(**options: Any) -> Trainer:
    """Return a trainer on the CPU that writes and prints nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit_images(method: Fitted, images: Tensor, batch: int = 3) -> Fitted:
    """Fit with Lightning's loop on images that are already normalised."""
    batches = [
        {"image": part, "category": ["a"] * len(part), "index": torch.arange(len(part))}
        for part in images.split(batch)
    ]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    quiet_trainer(max_epochs=1).fit(method, loader)
    return method.eval()


class Outputs(Callback):
    """Collect the outputs of the test steps."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Tensor]] = {}

    def on_test_batch_end(self, *arguments: Any) -> None:
        _, _, outputs, batch, *_ = arguments
        for name, value in [*outputs.items(), ("mask", batch["mask"])]:
            self.kept.setdefault(name, []).append(value.clone())

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.kept[name])


class Steps(Callback):
    """Collect the loss of each step and the layers after each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.layers: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, SDPPlus)
        self.layers.append({f"fc.{k}": v.clone() for k, v in module.fc.state_dict().items()})


def state_of(runs: Path, number: int = 1) -> dict[str, torch.Tensor]:
    """Return the state of the last checkpoint of a fit."""
    [file] = runs.glob(f"*/{number}-fit/checkpoints/last.ckpt")
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


def sdp_plus_command(
    root: Path, auxiliary: Path, clip: str, runs: Path, verb: str = "fit"
) -> list[str]:
    """Return a command line of SDP+ with a tiny CLIP; the auxiliary set has VisA's layout."""
    words = [verb, "--model", "SDPPlus", "--model.backbone.name", clip, "--model.lr", "0.01"]
    words += ["--model.backbone.pretrained", "random", "--model.rvs.method", "mean"]
    words += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    words += ["--data.auxiliary", "VisA", "--data.auxiliary.root", str(auxiliary)]
    words += ["--trainer.accelerator", "cpu", "--output.root", str(runs)]
    words += ["--trainer.log_every_n_steps", "1"]
    return [*words, "--model.prompts.templates", '["a {}."]']
