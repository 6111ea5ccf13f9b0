from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calibrations import write_photographs
from helpers import save_picture
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.conformal import binomial_interval
from anomaly_clip.errors import UserError
from anomaly_clip.exporting import labelled
from anomaly_clip.exporting.labelled import (
    Drift,
    Measured,
    labelled_images,
    measure_drift,
    range_images,
)
from anomaly_clip.preprocessing import Preprocessing

SIDE = 32


def detector() -> Any:
    """Return what is used of a detector."""
    return SimpleNamespace(
        preprocessing=Preprocessing(),
        method=SimpleNamespace(image_size=SIDE),
        resolve=lambda: ("parts", None),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write images as MVTec-AD has them: 6 normal and 4 with defects, 2 of them without masks."""
    root = tmp_path / "parts"
    write_photographs(root / "train" / "good", 5, seed=100)
    write_photographs(root / "test" / "good", 6, seed=0)
    write_photographs(root / "test" / "cut", 4, seed=20, defect=8)
    mask = np.zeros((40, 56), np.uint8)
    mask[16:24, 20:28] = 255
    for number in range(4):
        save_picture(root / "ground_truth" / "cut" / f"{number}_mask.png", mask)
    return root


def brightness(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return maps of brightness, and their largest value."""
    maps = images.mean(axis=1, dtype=np.float32) / 255
    return {"image_score": maps.max(axis=(1, 2)), "anomaly_map": maps}


def noisy(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return other maps, and scores of which that of the first normal image is too high."""
    outputs = brightness(images)
    noise = np.random.default_rng(0).normal(0, 0.2, outputs["anomaly_map"].shape)
    outputs["anomaly_map"] = (outputs["anomaly_map"] + noise).astype(np.float32)
    outputs["image_score"] = outputs["image_score"].copy()
    outputs["image_score"][-1] = 2
    return outputs


def test_aurocs_are_those_of_scikit_learn(folder: Path) -> None:
    images = labelled_images(detector(), folder)
    assert images is not None
    batches = list(images.batches())
    pixels = np.concatenate([batch["image"].numpy() for batch in batches])
    labels = np.concatenate([batch["label"].numpy() for batch in batches])
    masks = np.concatenate([batch["mask"].numpy() for batch in batches])
    assert labels.tolist() == [True] * 4 + [False] * 6
    assert masks[:4].any(axis=(1, 2)).all()
    assert not masks[4:].any()
    record = CategoryCalibration((0.1, 0.5, 0.6))
    drift = measure_drift(images, brightness, {"onnxruntime": noisy}, record, 0.6)
    assert (drift.images, drift.anomalous, drift.unreadable, drift.left_out) == (10, 4, 0, 0)
    outputs = [noisy(pixels[:8]), noisy(pixels[8:])]  # in batches, as they are measured
    expected = np.concatenate([part["image_score"] for part in outputs])
    maps = np.concatenate([part["anomaly_map"] for part in outputs])
    measured = drift.programs["onnxruntime"]
    assert measured.image_auroc == pytest.approx(roc_auc_score(labels, expected))
    auroc = roc_auc_score(masks.ravel(), maps.ravel())
    assert measured.pixel_auroc == pytest.approx(auroc, abs=1e-4)
    assert drift.torch.image_auroc == 1
    assert measured.flips == 2  # the last image of each batch
    entry = drift.as_dict()["programs"]["onnxruntime"]
    assert entry["image_auroc_drift"] == measured.image_auroc - 1
    assert entry["flip_rate"] == list(binomial_interval(2, 10))


def test_without_a_calibration_there_are_no_flips(folder: Path) -> None:
    images = labelled_images(detector(), folder)
    assert images is not None
    drift = measure_drift(images, brightness, {"torch": brightness})
    assert drift.programs["torch"] == Measured(1.0, drift.torch.pixel_auroc, None)
    [line] = drift.lines("detector.pt2")
    assert line.startswith("detector.pt2 in torch, 10 labelled images of ")
    assert "image AUROC 100.00%, +0.000 points from torch" in line
    assert "decision" not in line
    assert drift.warnings("detector.pt2") == []


def test_maps_without_masks_have_no_pixel_auroc(tmp_path: Path) -> None:
    write_photographs(tmp_path / "good", 3, seed=0)
    write_photographs(tmp_path / "cut", 2, seed=9, defect=8)
    images = labelled_images(detector(), tmp_path)
    assert images is not None
    drift = measure_drift(images, brightness, {"torch": brightness})
    assert drift.torch.pixel_auroc is None
    assert "pixel" not in drift.lines("detector.pt2")[0]


@pytest.mark.parametrize("names", [["a", "b"], ["good"], []])
def test_folders_without_both_labels_are_not_measured(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        write_photographs(tmp_path / name, 2, seed=number * 10)
    assert labelled_images(detector(), tmp_path) is None
    assert labelled_images(detector(), tmp_path / "missing") is None


def test_unreadable_images_are_counted(folder: Path) -> None:
    (folder / "test" / "good" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    images = labelled_images(detector(), folder)
    assert images is not None
    drift = measure_drift(images, brightness, {"torch": brightness})
    assert (drift.images, drift.unreadable) == (9, 1)
    assert drift.lines("x")[-1].startswith("1 further image of ")
    for path in (folder / "test" / "cut").iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(UserError, match="0 of 5 are anomalous, so that there is no AUROC"):
        measure_drift(images, brightness, {"torch": brightness})


def test_of_many_images_evenly_spaced_ones_are_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelled, "MAX_MEASURED", 4)
    images = labelled_images(detector(), folder)
    assert images is not None
    drift = measure_drift(images, brightness, {"torch": brightness})
    assert (drift.images, drift.anomalous, drift.left_out) == (4, 2, 6)
    assert "6 further images" in drift.lines("x")[-1]


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        (Measured(0.9, 0.8, 0), []),
        (Measured(0.904, 0.796, 0), []),
        (Measured(0.894, 0.8, 0), ["its image AUROC changes by -0.60 points"]),
        (Measured(0.9, 0.81, None), ["its pixel AUROC changes by +1.00 points"]),
        (Measured(0.9, None, 3), ["3 of 50 decisions differ"]),
    ],
)
def test_warnings_of_changes(program: Measured, parts: list[str]) -> None:
    drift = Drift("photos", 50, 20, 0, 0, Measured(0.9, 0.8), {"onnxruntime": program})
    messages = drift.warnings("detector.onnx")
    assert len(messages) == bool(parts)
    assert all(part in messages[0] for part in parts)


def test_lines_of_flips() -> None:
    programs = {"onnxruntime": Measured(0.9, 0.8, 1), "openvino": Measured(0.95, 0.8, 0)}
    lines = Drift("photos", 50, 20, 0, 0, Measured(0.9, 0.8), programs).lines("detector.onnx")
    assert lines[0].endswith("1 of 50 decisions differ (0.1% to 10.6% with 95 % confidence)")
    assert "image AUROC 95.00%, +5.000 points from torch" in lines[1]


def test_ranges_come_from_normal_images(folder: Path, tmp_path: Path) -> None:
    images, source = range_images(detector(), folder)
    assert images.shape == (11, 3, SIDE, SIDE)
    assert images.dtype == np.uint8
    assert source == f"11 normal images of {folder}"
    images, source = range_images(detector(), None)
    assert len(images) == labelled.NUM_RANGE_IMAGES
    assert source == "32 generated images"
    flat = write_photographs(tmp_path / "flat", 3, seed=0)
    assert len(range_images(detector(), flat)[0]) == 3
    with pytest.raises(UserError, match="it has no normal image"):
        range_images(detector(), tmp_path / "missing")
    (flat / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert len(range_images(detector(), flat)[0]) == 2
    for path in flat.iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(UserError, match="none of its normal images can be read"):
        range_images(detector(), flat)
