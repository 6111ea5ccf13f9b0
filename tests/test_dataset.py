from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layouts import visa
from torch import Tensor

from anomaly_clip.data import (
    AnomalyData,
    MVTecAD,
    Resize,
    VisA,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "data.image_size must be 1 or more"),
        ({"mask_size": -1}, "data.mask_size must be 1 or more"),
        ({"mask_threshold": 1.0}, "data.mask_threshold"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"shots": 0}, "data.shots must be 1 or more"),
        ({"fraction": 0.0}, r"data.fraction must be in \(0, 1\]"),
        ({"fraction": 0.5, "shots": 1}, r"data\.shots 1 and data\.fraction 0\.5 exclude each"),
        ({"val_share": 1.0}, r"data.val_share must be in \(0, 1\)"),
        ({"seed": -1}, "data.seed must be 0 or more"),
        ({"image_size": 8, "resize": Resize("square_crop", 7)}, "data.resize.size 7: .* 8 or more"),
        ({"image_size": 8, "resize": Resize("shorter_crop")}, "data.resize.size None"),
        ({"image_size": 8, "resize": Resize("square", 9)}, "rule square does not crop"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MVTecAD("root", **options)


def test_without_a_model_the_image_size_must_be_given(mvtec_root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.image_size is None: set it"):
        MVTecAD(str(mvtec_root)).dataset("test")


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_detector", [True, False])
def test_an_evaluation_reads_labels_and_masks_on_the_cpu(
    mvtec_root: Path, training: bool, is_detector: bool
) -> None:
    data = tiny(mvtec_root, batch_size=2)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    module = SimpleNamespace(is_detector=is_detector)
    data.trainer = SimpleNamespace(training=training, lightning_module=module)  # type: ignore[assignment]
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert list(moved) == list(batch)
    kept = {k for k, v in moved.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    assert kept == ({"label", "mask", "index"} if is_detector and not training else set())
    assert moved["path"] == batch["path"]


def test_test_images_in_training_are_refused_by_content(mvtec_root: Path) -> None:
    train = mvtec_root / "bottle" / "train" / "good"
    shutil.copy(mvtec_root / "bottle" / "test" / "good" / "000.png", train / "another name.png")
    with pytest.raises(ValueError, match=r"1 test images are among .*good/000\.png = .*another"):
        tiny(mvtec_root).setup("fit")
    allowed = tiny(mvtec_root, allow_overlap=True)
    allowed.setup("fit")
    assert [pair.second.name for pair in allowed.overlap()] == ["000.png"]
    tiny(mvtec_root, categories=["metal_nut"]).setup("fit")
    tiny(mvtec_root).setup("test")


def test_equal_names_are_no_overlap(mvtec_root: Path) -> None:
    assert tiny(mvtec_root).overlap() == []  # train/good/000.png and test/good/000.png


def test_words_for_categories(mvtec_root: Path) -> None:
    data = tiny(mvtec_root, words={"metal_nut": "metal nut"})
    assert [data.words(name) for name in data.categories] == ["bottle", "metal nut"]


def test_the_protocol_records_what_metrics_depend_on(mvtec_root: Path) -> None:
    plain, other = tiny(mvtec_root), tiny(mvtec_root, mask_filter="nearest", mask_threshold=0.0)
    assert plain.protocol() != other.protocol()
    assert plain.protocol()["words"] == {"bottle": "bottle", "metal_nut": "metal_nut"}


def test_the_summary_counts_what_a_stage_reads(mvtec_root: Path, tmp_path: Path) -> None:
    data: AnomalyData = tiny(mvtec_root, categories=["bottle"])
    assert data.summary("test") == "4 images (2 anomalous) in 1 category"
    assert data.summary("fit") == "2 images (0 anomalous) in 1 category"
    auxiliary = VisA(str(visa(tmp_path / "visa")))
    summary = tiny(mvtec_root, auxiliary=auxiliary).summary("fit")
    assert summary == f"6 images (4 anomalous) in 2 categories of VisA {tmp_path / 'visa'}"
