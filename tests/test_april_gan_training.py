"""Golden fit and tests of APRIL-GAN, on images that are written as a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden, Outputs, near, quiet_trainer, save_picture
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.data import MVTecAD
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.data.samples import Sample
from anomaly_clip.losses import dice_loss, focal_loss
from anomaly_clip.methods import APRILGAN, linear_layers
from anomaly_clip.methods.april_gan import PROMPTS
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.records import Draw

METRICS = [f"pixel_{name}" for name in ("auroc", "f1_max", "ap", "pro")]
METRICS += [f"image_{name}" for name in ("auroc", "f1_max", "ap")]
"""Metrics in the order of the golden arrays."""


@pytest.fixture(scope="module")
def arrays(golden: Callable[[str], Golden]) -> Golden:
    return golden("april_gan")


@pytest.fixture(scope="module")
def golden_tower(arrays: Golden) -> CLIPBackbone:
    """Return the CLIP that produced the golden arrays."""
    config, weights = (
        str(arrays.folder / name) for name in ("model_config.json", "state_dict.safetensors")
    )
    return CLIPBackbone(config, weights, arrays.meta["image_size"])


@pytest.fixture
def root(arrays: Golden, tmp_path: Path) -> Path:
    """Write the golden images as a category of MVTec-AD; the name of a file is its row."""
    category = tmp_path / "golden" / arrays.meta["object"]
    inputs = arrays.inputs
    for row, image in enumerate(inputs["e2e.train_images"]):
        save_picture(category / "train" / "good" / f"{row:03d}.png", image.numpy())
    for row, image in enumerate(inputs["e2e.images"]):
        defect = f"{row:03d}" if inputs["e2e.labels"][row] else "good"
        save_picture(category / "test" / defect / f"{row:03d}.png", image.numpy())
        if defect != "good":
            mask = inputs["e2e.masks"][row].numpy().astype(np.uint8)
            save_picture(category / "ground_truth" / defect / f"{row:03d}_mask.png", mask)
    return category.parent


def built(arrays: Golden, tower: CLIPBackbone, **options: Any) -> APRILGAN:
    """Return APRIL-GAN with the golden layers."""
    meta = arrays.meta
    options = {"linear_layers": str(arrays.folder / "linear.pth"), "feature_cache_gb": 0, **options}
    return APRILGAN(
        tower, layers=meta["layers"], memory_layers=meta["few_shot_layers"], **options
    ).eval()


def rows_of(samples: Any) -> list[int]:
    """Return the rows of the golden arrays of samples."""
    return [int(sample.image.stem) for sample in samples]


@pytest.mark.golden
def test_golden_losses(arrays: Golden) -> None:
    probability, target = arrays.inputs["loss.prob"][:, 1], arrays.inputs["loss.target"].bool()
    for name, loss in (("focal", focal_loss), ("dice", dice_loss)):
        expected = arrays.expected[f"loss.{name}"]
        assert_close(loss(probability, target), expected, atol=1e-5, rtol=0)


@pytest.mark.golden
def test_golden_tokens(arrays: Golden, golden_tower: CLIPBackbone) -> None:
    prompts = PROMPTS.for_category(arrays.meta["objects"][0])
    for kind, filled in zip(("normal", "abnormal"), prompts, strict=True):
        expected = arrays.expected[f"text.tokens.{kind}"].long()
        tokens = golden_tower.tokenize(filled)
        assert torch.equal(tokens[:, : expected.shape[1]], expected)
        assert not tokens[:, expected.shape[1] :].any()


class Recorder(Callback):
    """Collect the gradients of the first step and the layers after each epoch."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.layers: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.gradients:
            named = dict(module.named_parameters())
            self.gradients = {
                name: value.grad.clone()
                for name, value in named.items()
                if value.requires_grad and value.grad is not None
            }

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        state = module.state_dict()
        self.layers.append({name: state[name].clone() for name in self.gradients})


@pytest.mark.golden
def test_golden_training(
    arrays: Golden,
    golden_tower: CLIPBackbone,
    root: Path,
    mvtec_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = arrays.meta["train"]
    auxiliary = MVTecAD(str(root), batch_size=train["batch_size"])
    data = MVTecAD(str(mvtec_root), auxiliary=auxiliary, num_workers=0)
    count = len(arrays.inputs["e2e.images"])

    def in_golden_order(sampler: EpochSampler) -> Iterator[Draw]:
        rows = rows_of(data.fit_samples())
        epoch = sampler.epoch
        for row in train["order"][epoch * count : (epoch + 1) * count]:
            yield Draw(epoch, rows.index(row))

    monkeypatch.setattr(EpochSampler, "__iter__", in_golden_order)
    terms: dict[str, list[float]] = {"focal": [], "dice": []}
    for name, values in terms.items():
        ordinary = getattr(linear_layers, f"{name}_loss")

        def recorded(*parts: Tensor, compute: Any = ordinary, into: list[float] = values) -> Tensor:
            loss = compute(*parts)
            into.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(linear_layers, f"{name}_loss", recorded)
    method, recorder = built(arrays, golden_tower, lr=train["lr"]), Recorder()
    assert method.configure_optimizers().defaults["betas"] == tuple(train["betas"])
    quiet_trainer(max_epochs=train["epochs"], callbacks=[recorder]).fit(method, data)
    for name, values in terms.items():
        expected = arrays.expected[f"train.{name}"].float()
        assert_close(torch.tensor(values).view_as(expected), expected, atol=1e-3, rtol=0)
    gradients = arrays.named("train.first_gradient.")
    assert gradients.keys() == recorder.gradients.keys()
    for key, expected in gradients.items():
        near(recorder.gradients[key], expected, 1e-3)
    assert len(recorder.layers) == train["epochs"]
    for epoch, state in enumerate(recorder.layers, start=1):
        for key, expected in arrays.named(f"train.epoch_{epoch}.").items():
            difference = (state[key] - expected).abs()
            # Adam's first steps are equally large for all gradients; tiny gradients may flip sign.
            assert (difference > 1e-4).float().mean() <= 1e-3, (epoch, key)


class DrawnWithReplacement(MVTecAD):
    """Data set whose references are those of the official draw, in which images may repeat."""

    rows: tuple[int, ...] = ()

    def shots_of(self, category: str) -> list[Sample]:
        normal = {int(sample.image.stem): sample for sample in self.listing.normal(category)}
        return [normal[row] for row in self.rows]


def check_test(arrays: Golden, method: APRILGAN, data: MVTecAD, name: str) -> Outputs:
    """Run a test and compare maps, masks and metrics with the golden arrays of a name."""
    expected, outputs = arrays.expected, Outputs()
    quiet_trainer(callbacks=[outputs]).test(method, data, verbose=False)
    rows = rows_of(data.samples("test"))
    assert sorted(rows) == list(range(len(rows)))
    assert_close(outputs["anomaly_map"], expected[f"{name}.map"][rows], atol=2e-4, rtol=0)
    assert torch.equal(outputs["mask"], expected["e2e.gt_px"][rows].bool())
    results = method.results
    assert results is not None
    for metric, value in zip(METRICS, expected[f"{name}.metrics"].tolist(), strict=True):
        tolerance = 5e-3 if metric == "pixel_pro" else 1e-3
        assert results["mean"][metric] == pytest.approx(value, abs=tolerance), metric
    return outputs


EVALUATOR = EvaluatorSettings(pro_steps=200)


@pytest.mark.golden
def test_golden_zero_shot_end_to_end(
    arrays: Golden, golden_tower: CLIPBackbone, root: Path
) -> None:
    data = MVTecAD(str(root), num_workers=0, batch_size=4)
    method = built(arrays, golden_tower, evaluator=EVALUATOR)
    outputs = check_test(arrays, method, data, "zero_shot")
    expected = arrays.expected["zero_shot.score"][rows_of(data.samples("test"))]
    assert_close(outputs["image_score"], expected, atol=1e-4, rtol=0)


@pytest.mark.golden
def test_golden_few_shots_end_to_end(
    arrays: Golden, golden_tower: CLIPBackbone, root: Path
) -> None:
    assert arrays.meta["shots"]
    for shots, rows in arrays.meta["shots"].items():
        name = f"few_shot_{shots}"
        data = DrawnWithReplacement(str(root), num_workers=0, batch_size=4, shots=int(shots))
        data.rows = tuple(rows)
        method = built(arrays, golden_tower, evaluator=EVALUATOR)
        check_test(arrays, method, data, name)
        images = method.evaluator.images
        assert images is not None
        expected = arrays.expected[f"{name}.score"][rows_of(data.samples("test"))]
        # The official score is half of the sum, which ranks images in the same way.
        assert_close(images.score / 2, expected, atol=1e-3, rtol=0)
        assert method.reference_paths.keys() == {arrays.meta["object"]}
