"""Training of AnomalyCLIP, and complete tests of it, as with the official code."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden, Outputs, near, quiet_trainer, save_picture
from lightning.pytorch import Callback, LightningModule, Trainer
from object_agnostic_methods import golden_method, golden_tower
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.data import MVTecAD, VisA
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.methods import object_agnostic
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.records import Draw

Arrays = Callable[[str], Golden]
NAME = "widget"


@pytest.fixture(scope="module")
def tower(golden: Arrays) -> CLIPBackbone:
    return golden_tower(golden("anomalyclip"))


@pytest.fixture
def tested(golden: Arrays, tmp_path: Path) -> Path:
    """Write the golden images in MVTec-AD's layout; return the root."""
    inputs, category = golden("anomalyclip").inputs, tmp_path / "mvtec" / NAME
    pairs = zip(inputs["e2e.images"], inputs["e2e.masks"], strict=True)
    for number, (image, mask) in enumerate(pairs):
        anomalous = bool(inputs["e2e.labels"][number])
        defect = "scratch" if anomalous else "good"
        save_picture(category / "test" / defect / f"{number:03d}.png", image.numpy())
        if anomalous:
            path = category / "ground_truth" / defect / f"{number:03d}_mask.png"
            save_picture(path, mask.numpy().astype(np.uint8))
    save_picture(category / "train" / "good" / "000.png")
    return category.parent


@pytest.fixture
def trained_on(golden: Arrays, tmp_path: Path) -> Path:
    """Write the golden images as a labelled test split in the same order."""
    inputs, root = golden("anomalyclip").inputs, tmp_path / "auxiliary"
    rows = [["object", "split", "label", "image", "mask"]]
    pairs = zip(inputs["e2e.images"], inputs["e2e.masks"], strict=True)
    for number, (image, mask) in enumerate(pairs):
        files = [f"{NAME}/Data/Images/{number:03d}.png", f"{NAME}/Data/Masks/{number:03d}.png"]
        save_picture(root / files[0], image.numpy())
        save_picture(root / files[1], mask.numpy().astype(np.uint8))
        anomalous = bool(inputs["e2e.labels"][number])
        label = "anomaly" if anomalous else "normal"
        rows.append([NAME, "test", label, files[0], files[1] if anomalous else ""])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.golden
@pytest.mark.parametrize(("prefix", "layers"), [("e2e", "e2e_layers"), ("e2e_multi", "layers")])
@pytest.mark.parametrize("round_deep", [True, False])
def test_golden_end_to_end(
    golden: Arrays,
    tower: CLIPBackbone,
    tested: Path,
    prefix: str,
    layers: str,
    round_deep: bool,
) -> None:
    arrays = golden("anomalyclip")
    expected = arrays.named(f"{prefix}.")
    data = MVTecAD(str(tested), batch_size=4, num_workers=0)
    method = golden_method(
        arrays,
        tower,
        layers=arrays.meta[layers],
        evaluator=EvaluatorSettings(pro_steps=200),
        prompt={"round_deep": round_deep},
    )
    outputs = Outputs()
    quiet_trainer(callbacks=[outputs]).test(method, data, verbose=False)
    order = [int(sample.image.stem) for sample in data.samples("test")]
    assert_close(outputs["anomaly_map"], expected["map"][order], atol=4e-4, rtol=0)
    assert_close(outputs["image_score"], expected["score"][order], atol=2e-4, rtol=0)
    if "gt_px" in expected:
        assert torch.equal(outputs["mask"], expected["gt_px"][order].bool())
    images, results = method.evaluator.images, method.results
    assert images is not None
    assert results is not None
    assert_close(images.score, expected["score"][order].float(), atol=2e-4, rtol=0)
    values = dict(
        zip(
            ("pixel_auroc", "pixel_pro", "image_auroc", "image_ap"),
            expected["metrics"].tolist(),
            strict=True,
        )
    )
    for name, value in values.items():
        tolerance = 5e-3 if name == "pixel_pro" else 1e-3
        assert results["mean"][name] == pytest.approx(value, abs=tolerance), name


class Steps(Callback):
    """Collect the loss and the first gradients of a fit, and the prompts after each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.prompts: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.gradients:
            self.gradients = official(module, lambda parameter: parameter.grad.clone())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.prompts.append(official(module, lambda parameter: parameter.detach().clone()))


def official(method: Any, read: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Return what is read from each parameter, by the names of the official code."""
    context = read(method.prompts.shallow.context)[None, None]
    named = {"ctx_pos": context[:, :, 0], "ctx_neg": context[:, :, 1]}
    deep = enumerate(method.prompts.deep)
    return {**named, **{f"compound_prompts_text.{number}": read(rows) for number, rows in deep}}


@pytest.mark.golden
@pytest.mark.parametrize("round_deep", [True, False])
def test_golden_training(
    golden: Arrays,
    tower: CLIPBackbone,
    mvtec_root: Path,
    trained_on: Path,
    round_deep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrays = golden("anomalyclip")
    expected, train = arrays.expected, arrays.meta["train"]
    drawn = torch.tensor(train["order"]).view(train["epochs"], -1).tolist()
    terms: dict[str, list[float]] = {"focal": [], "dice": []}
    for name, values in terms.items():
        ordinary = getattr(object_agnostic, f"{name}_loss")

        def recorded(*parts: Tensor, compute: Any = ordinary, into: list[float] = values) -> Tensor:
            loss = compute(*parts)
            into.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(object_agnostic, f"{name}_loss", recorded)

    def in_order(sampler: EpochSampler) -> Iterator[Draw]:
        return iter([Draw(sampler.epoch, row) for row in drawn[sampler.epoch]])

    monkeypatch.setattr(EpochSampler, "__iter__", in_order)
    auxiliary = VisA(str(trained_on), batch_size=train["batch_size"])
    data = MVTecAD(str(mvtec_root), auxiliary=auxiliary, num_workers=0)
    method = golden_method(
        arrays,
        tower,
        layers=train["layers"],
        lr=train["lr"],
        local_weight=train["local_weight"],
        prompt={"round_deep": round_deep},
        feature_cache_gb=0,  # features of the cache are in half precision
    )
    assert list(object_agnostic.BETAS) == train["betas"]
    steps = Steps()
    quiet_trainer(max_epochs=train["epochs"], callbacks=[steps]).fit(method, data)
    count, layers = expected["train.focal"].shape
    near(torch.tensor(terms["focal"]).view(count, layers), expected["train.focal"], 1e-3)
    dice = torch.tensor(terms["dice"]).view(count, 2, layers)
    near(dice[:, 0], expected["train.dice_abnormal"], 1e-3)
    near(dice[:, 1], expected["train.dice_normal"], 1e-3)
    local = sum(expected[f"train.{name}"] for name in ("focal", "dice_abnormal", "dice_normal"))
    total = train["local_weight"] * local.sum(dim=1) + expected["train.image"]  # type: ignore[union-attr]
    near(torch.tensor(steps.losses), total, 1e-3)
    for key, gradient in arrays.named("train.first_gradient.").items():
        near(steps.gradients[key], gradient, 4e-3)
    assert len(steps.prompts) == train["epochs"]
    for epoch, prompts in enumerate(steps.prompts, start=1):
        for key, vectors in arrays.named(f"train.epoch_{epoch}.").items():
            assert_close(prompts[key], vectors, atol=1e-4, rtol=0, msg=f"{epoch} {key}")
