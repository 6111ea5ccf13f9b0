"""Sections of ``gpu.py`` that compare maps with the CPU's, and metrics in bf16 with float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from common import ROOT
from gpu_lab import B_16, Lab, dtype_of, matrix_precision, mixed, on_device, smooth_images
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.data import Demo
from anomaly_clip.methods import SDP, AnomalyMethod, PaDiM, PatchCore, SDPPlus, WinCLIP
from anomaly_clip.metrics import Evaluator
from anomaly_clip.records import DEMO, RANDOM

__all__ = ["equality", "precision_drift"]


def equality(lab: Lab) -> list[dict[str, Any]]:
    """Compare the device's maps with the CPU's; differences are fractions of the maps' range."""
    sizes = lab.sizes
    rows = []
    models = [(DEMO, DEMO, 64 if sizes.tiny else 160)]
    if not sizes.tiny:
        models.append((B_16, RANDOM, sizes.equality_side))
    for name, pretrained, side in models:
        torch.manual_seed(0)
        backbone = CLIPBackbone(name, pretrained, side)
        images = smooth_images(4, side)
        text = F.normalize(torch.randn(4, backbone.visual.output_dim, 2), dim=1)
        for kind in (SDP, SDPPlus, WinCLIP):
            if lab.has_time(f"equality, {kind.__name__}, {name}"):
                method = kind(backbone).eval()
                score = partial(_map_with_text, method, images, text)
                rows.append({"model": name, "side": side, **_compared(lab, method, score)})
    for detector in (PaDiM, PatchCore):
        if lab.has_time(f"equality, {detector.__name__}"):
            torch.manual_seed(0)
            fitted = _fitted(detector, sizes.cnn_side)
            score = partial(_map_of, fitted, smooth_images(4, sizes.cnn_side))
            row = _compared(lab, fitted, score)
            rows.append({"model": "resnet18", "side": sizes.cnn_side, **row})
    return rows


def _compared(
    lab: Lab, method: AnomalyMethod, score: Callable[[torch.device], Tensor]
) -> dict[str, Any]:
    cpu = torch.device("cpu")
    target = score(cpu)
    extent = float(target.max() - target.min())
    row: dict[str, Any] = {"method": type(method).__name__, "images": len(target), "range": extent}
    method.to(lab.device)
    # A run uses torch's default: TF32 in convolutions, but not in matrix products.
    for name in ("fp32", "default"):
        with matrix_precision(name):
            apart = float((score(lab.device).cpu() - target).abs().max())
        if not math.isfinite(apart):
            raise ValueError(f"{type(method).__name__}: the map is not finite on {lab.device}")
        row[f"difference_{name}"] = apart / extent
    method.to(cpu)
    return row


@torch.inference_mode()
def _map_with_text(
    method: SDP | WinCLIP, images: Tensor, text: Tensor, device: torch.device
) -> Tensor:
    return method.score_with_text(images.to(device), text.to(device))["anomaly_map"]


@torch.inference_mode()
def _map_of(method: AnomalyMethod, images: Tensor, device: torch.device) -> Tensor:
    return method.score(images.to(device), ["noise"] * len(images))["anomaly_map"]


def _fitted(kind: type[PaDiM] | type[PatchCore], side: int) -> PaDiM | PatchCore:
    """Fit a detector with a randomly initialised ResNet-18 on the CPU, to a few images."""
    method = kind(CNNSettings("resnet18", RANDOM), image_size=side)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    images = smooth_images(16, side, seed=1)
    batches = [
        {"image": part, "index": torch.arange(8 * number, 8 * number + len(part))}
        for number, part in enumerate(images.split(8))
    ]
    trainer.fit(method, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return method.eval()


def precision_drift(lab: Lab) -> dict[str, Any]:
    """Return the demo's metrics of SDP with the demo CLIP in float32 and in bf16."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    options = {**config["data"]["init_args"], **lab.sizes.demo}
    model = config["model"]["init_args"]
    side, sigma = model["backbone"]["image_size"], model["sigma"]
    data = Demo(image_size=side, batch_size=64, num_workers=0, **options)
    data.setup("test")
    batches = [on_device(lab.device, batch) for batch in data.test_dataloader()]
    means: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        sdp = SDP(CLIPSettings(DEMO, DEMO, side), sigma=sigma).to(lab.device).eval()
        sdp.backbone.cast(dtype_of(precision))
        evaluator = Evaluator(data.categories).to(lab.device)
        with torch.inference_mode(), matrix_precision("fp32"), mixed(lab.device, precision):
            for number, batch in enumerate(batches):
                evaluator.update(sdp.predict_step(batch, number), batch)
        means[precision] = evaluator.compute()["mean"]
    drift = {name: means["bf16"][name] - value for name, value in means["fp32"].items()}
    return {"images": len(data.samples("test")), **means, "drift": drift}
