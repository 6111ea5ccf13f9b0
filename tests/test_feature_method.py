from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods.feature_method import FeatureMethod, FittedMethod, TrainedMethod
from anomaly_clip.metric_values import Results
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.records import Batch, Scores
from anomaly_clip.synthesis import SynthesisSettings

LAYERS = ["layer1", "layer3"]


class Mean(FittedMethod):
    """Method that scores mean brightness relative to that of the training images."""

    fitted_buffers: ClassVar[tuple[str, ...]] = ("levels", "count")
    levels: Tensor

    def __init__(self, backbone: CNNBackbone) -> None:
        super().__init__(backbone, LAYERS, 32, EvaluatorSettings())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        levels = batch["image"].double().mean(dim=(1, 2, 3))
        self.keep(levels=levels, count=torch.tensor([len(levels)]))

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        self.check_fitted()
        return Scores(image_score=images.float().mean(dim=(1, 2, 3)) - self.levels.mean())


class Offset(TrainedMethod):
    """Method that scores mean brightness plus one trained offset."""

    def __init__(self, backbone: CNNBackbone, select: Any = "last") -> None:
        super().__init__(backbone, LAYERS, 32, select, EvaluatorSettings())
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        self.check_trained()
        return Scores(image_score=images.float().mean(dim=(1, 2, 3)) + self.offset)


@pytest.fixture(scope="module")
def cnn() -> CNNBackbone:
    return CNNBackbone.of(CNNSettings("resnet18", "random", [*LAYERS, "pooled"]))


# -- layers --------------------------------------------------------------------------------------


def test_only_the_layers_that_are_read_are_computed() -> None:
    class Any32(Mean):
        def __init__(self, backbone: Any) -> None:
            FittedMethod.__init__(self, backbone, LAYERS, 32, EvaluatorSettings())

    settings = {"name": "resnet18", "weights": "random"}  # as read from a checkpoint
    method = Any32(settings)
    assert list(method.backbone.channels) == LAYERS
    assert method.backbone_settings == CNNSettings("resnet18", "random")
    assert method.image_size == 32


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"model\.layers must name spatial layers .* \(layer1, layer3\), got \[\]"),
        (["layer2"], "must name spatial layers of the backbone"),
        (["pooled"], "must name spatial layers of the backbone"),
        (["layer3", "layer1"], r"the finest layer first, got .* with strides \[16, 4\]"),
    ],
)
def test_layers_must_belong_to_the_backbone(
    cnn: CNNBackbone, layers: list[str], message: str
) -> None:
    method = Mean(cnn)
    assert method.check_layers(tuple(LAYERS)) == LAYERS
    with pytest.raises(ValueError, match=message):
        method.check_layers(layers)


def test_images_have_a_minimum_size(cnn: CNNBackbone) -> None:
    class Small(Mean):
        def __init__(self, size: int) -> None:
            FeatureMethod.__init__(self, cnn, LAYERS, size, EvaluatorSettings())

    assert Small(32).image_size == 32
    with pytest.raises(ValueError, match=r"model\.image_size must be 32 or more, got 31"):
        Small(31)


# -- fitting in a single pass --------------------------------------------------------------------


def test_fitted_buffers_are_saved_and_restored(cnn: CNNBackbone, mvtec_root: Path) -> None:
    method = Mean(cnn)
    with pytest.raises(ValueError, match="Mean must be fitted first, or loaded"):
        method.score(torch.zeros(1, 3, 32, 32), ["a"])
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0)
    quiet_trainer(max_epochs=1).fit(method, data)
    assert (method.levels.dtype, method.levels.shape) == (torch.float32, (2,))
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"unused", "levels", "count"}
    other = Mean(cnn)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(other.levels, method.levels)
    assert other.count.dtype == torch.int64  # integers stay integers


def test_fitted_numbers_are_kept_in_float32_at_least(cnn: CNNBackbone) -> None:
    method = Mean(cnn)
    method.keep(levels=torch.ones(2, dtype=torch.float16))
    assert method.levels.dtype == torch.float32
    method.double().keep(levels=torch.ones(2))
    assert method.levels.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "epochs", "message"),
    [
        ({}, 2, r"Mean is fitted in a single pass: set trainer\.max_epochs to 1, not 2"),
        ({"val_split": "test"}, 1, r"set data\.val_split to none, not test"),
        ({"synthesis": SynthesisSettings()}, 1, r"leave out data\.synthesis"),
        ({"auxiliary": True}, 1, r"leave out data\.auxiliary"),
        ({"categories": None}, 1, "Mean is one model per category"),
    ],
)
def test_unsupported_fits_are_refused(
    cnn: CNNBackbone, mvtec_root: Path, options: dict[str, Any], epochs: int, message: str
) -> None:
    if "auxiliary" in options:
        options = {"auxiliary": MVTecAD(str(mvtec_root)), "allow_overlap": True}
    data = MVTecAD(str(mvtec_root), **{"categories": ["bottle"], "num_workers": 0, **options})
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=epochs).fit(Mean(cnn), data)


def test_a_fit_in_a_single_pass_is_not_resumed(
    cnn: CNNBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    data = MVTecAD(str(mvtec_root), categories=["bottle"], num_workers=0)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Mean(cnn), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match="Mean is fitted in a single pass, which cannot be resumed"
    ):
        quiet_trainer(max_epochs=1).fit(Mean(cnn), data, ckpt_path=str(tmp_path / "a.ckpt"))


# -- training in epochs --------------------------------------------------------------------------


def validated(
    method: Offset, merits: list[float | None], pixels: list[float | None] | None = None
) -> None:
    """End one validation epoch per merit, with the index of the epoch as the offset."""
    for epoch, merit in enumerate(merits):
        with torch.no_grad():
            method.offset.fill_(epoch)
        mean = {"image_auroc": merit, "pixel_auroc": None if pixels is None else pixels[epoch]}
        results = Results(mean=mean, categories={}, intervals={})
        method.evaluator = SimpleNamespace(compute=lambda r=results: r, reset=lambda: None)  # type: ignore[assignment]
        state = SimpleNamespace(stage=RunningStage.VALIDATING, fn=TrainerFn.FITTING)
        method._trainer = SimpleNamespace(state=state, current_epoch=epoch)  # type: ignore[assignment]
        method.log_metrics = lambda *_: None  # type: ignore[method-assign]
        method.on_validation_epoch_end()


@pytest.mark.parametrize(
    ("merits", "chosen"),
    [
        ([0.5, 0.75, 0.75, 0.25], 1),  # the first of equal merits
        ([None, 0.0], 1),
        ([None, None], None),
    ],
)
def test_best_test_restores_the_best_epoch(
    cnn: CNNBackbone, merits: list[float | None], chosen: int | None
) -> None:
    method = Offset(cnn, "best_test")
    validated(method, merits)
    # The best epoch is restored only from a checkpoint.
    assert method.protocol() == {"select": "last", "selected_epoch": None}
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    tested = Offset(cnn, "best_test")
    tested.on_load_checkpoint(checkpoint)
    tested.load_state_dict(checkpoint["state_dict"])
    last = len(merits) - 1
    assert tested.offset.item() == (last if chosen is None else chosen)
    select = "last" if chosen is None else "best_test"
    number = None if chosen is None else chosen + 1
    assert tested.protocol() == {"select": select, "selected_epoch": number}


def simplenet_best(image: list[float], pixel: list[float]) -> int:
    """Return the epoch that SimpleNet's public code keeps."""
    best, kept = [image[0], pixel[0]], 0
    for epoch in range(1, len(image)):
        if image[epoch] > best[0]:
            best, kept = [image[epoch], pixel[epoch]], epoch
        elif image[epoch] == best[0] and pixel[epoch] > best[1]:
            best[1], kept = pixel[epoch], epoch
    return kept


@pytest.mark.parametrize(
    ("image", "pixel", "chosen"),
    [
        ([0.5, 1.0, 1.0, 1.0, 0.75], [0.9, 0.6, 0.8, 0.7, 0.99], 2),
        ([1.0, 1.0, 0.5], [0.7, 0.7, 0.9], 0),  # the first of those equal in both
        ([1.0, 0.5, 1.0, 1.0], [0.6, 0.9, 0.5, 0.61], 3),
    ],
)
def test_among_equal_image_aurocs_the_pixel_auroc_decides(
    cnn: CNNBackbone, image: list[float | None], pixel: list[float | None], chosen: int
) -> None:
    method = Offset(cnn, "best_test")
    validated(method, image, pixel)
    assert method._best is not None
    assert method._best["epoch"] == chosen == simplenet_best(image, pixel)  # type: ignore[arg-type]
    assert method._best["state"]["offset"].item() == chosen
    kept = (method._best["merit"], method._best["tie_breaker"])
    assert kept == (image[chosen], pixel[chosen])


def test_a_tie_is_decided_in_the_same_way_after_a_resume(cnn: CNNBackbone) -> None:
    method = Offset(cnn, "best_test")
    validated(method, [1.0], [0.6])
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    for old, chosen in ((False, 1.0), (True, 0.0)):  # 0.1.0 kept the first of equal epochs
        resumed = Offset(cnn, "best_test")
        resumed._trainer = SimpleNamespace(state=state, datamodule=None)  # type: ignore[assignment]
        best = {k: v for k, v in checkpoint["best"].items() if not (old and k == "tie_breaker")}
        resumed.on_load_checkpoint({**checkpoint, "best": best})
        validated(resumed, [0.5, 1.0], [0.9, 0.8])
        assert resumed._best is not None
        assert resumed._best["state"]["offset"].item() == chosen


def test_a_resumed_fit_continues_from_the_last_epoch(cnn: CNNBackbone) -> None:
    method = Offset(cnn, "best_test")
    validated(method, [0.75, 0.5])
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    resumed = Offset(cnn, "best_test")
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    resumed._trainer = SimpleNamespace(state=state, datamodule=None)  # type: ignore[assignment]
    resumed.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"]["offset"].item() == 1
    assert resumed._best is not None
    assert resumed._best["merit"] == 0.75


def test_without_a_choice_no_state_is_kept(cnn: CNNBackbone) -> None:
    method = Offset(cnn)
    validated(method, [0.75, 0.5])
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    assert checkpoint["best"] is None


def test_nothing_is_scored_before_training(cnn: CNNBackbone) -> None:
    method = Offset(cnn)
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="Offset must be fitted first, or loaded"):
        method.score(images, ["a"])
    method.on_fit_start()
    assert method.score(images, ["a"])["image_score"].item() == 0
