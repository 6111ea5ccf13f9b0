from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image
from torch.utils.data import default_collate

from anomaly_clip.data import (
    MVTecAD,
    Resize,
    Sample,
    SampleDataset,
)
from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.samples import open_sample, read_sample


def test_items_make_a_batch(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), image_size=16, mask_size=20)
    dataset = data.dataset("test")
    batch = default_collate([dataset[i] for i in range(len(dataset))])
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (8, 20, 20)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].flatten(1).any(dim=1).tolist() == batch["label"].tolist()
    assert batch["label"].tolist() == [False, False, True, True] * 2
    assert batch["category"] == ["bottle"] * 4 + ["metal_nut"] * 4
    assert batch["index"].tolist() == list(range(8))
    assert batch["path"][2].endswith("bottle/test/scratch/000.png")


def test_a_data_set_without_masks_gives_none(tmp_path: Path) -> None:
    sample = Sample(save_picture(tmp_path / "a.png"), "thing", label=True)
    assert "mask" not in SampleDataset([sample], 16, 16, has_masks=False)[0]


def test_a_mask_of_another_size_is_an_error_with_both_sizes(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", size=40)
    mask = save_picture(tmp_path / "a_mask.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.raises(
        ValueError, match=r"a_mask\.png: the mask is 6 x 4 pixels, but its image a\.png is 40"
    ):
        SampleDataset([Sample(image, "thing", True, mask)], 16, 16)[0]


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def test_resizing_follows_the_rule_for_image_and_mask(mvtec_root: Path) -> None:
    mask_file = mvtec_root / "bottle" / "ground_truth" / "scratch" / "000_mask.png"
    corner = np.zeros((40, 48), np.uint8)
    corner[:3, :3] = 255
    save_picture(mask_file, corner)
    whole = tiny(mvtec_root, mask_size=32).dataset("test")[2]
    assert whole["mask"].any()
    cut = tiny(mvtec_root, mask_size=32, resize=Resize("square_crop", 24)).dataset("test")[2]
    assert cut["image"].shape == (3, 16, 16)
    assert cut["mask"].shape == (32, 32)
    assert not cut["mask"].any()  # the crop removed the defect
    assert cut["label"]  # the image stays anomalous


def test_a_tolerated_mask_is_resized_to_its_image_by_the_nearest_pixel(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", size=40)
    mask = np.random.default_rng(0).integers(0, 2, (43, 38), dtype=np.uint8) * 255
    sample = Sample(image, "thing", True, save_picture(tmp_path / "m.png", mask))
    with pytest.raises(ValueError, match=r"the mask is 38 x 43 pixels"):
        read_sample(sample, MaskRule(fitted=2))
    _, read = read_sample(sample, MaskRule(fitted=3))
    nearest = Image.fromarray(mask).resize((40, 40), Image.Resampling.NEAREST)
    assert read is not None
    assert np.array_equal(read, np.asarray(nearest) > 0)


def test_the_mask_of_a_normal_image_is_not_read(tmp_path: Path) -> None:
    sample = Sample(save_picture(tmp_path / "a.png"), "thing", False, tmp_path / "none.png")
    image, mask = read_sample(sample)
    assert mask is None
    opened, _ = open_sample(sample)
    assert np.array_equal(np.asarray(opened), image)
    item = SampleDataset([sample], 16, 8)[0]
    assert item["mask"].shape == (8, 8)
    assert not item["mask"].any()


def test_cached_features_replace_images(tmp_path: Path) -> None:
    listed = [Sample(tmp_path / f"{n}.png", "thing", bool(n), target=(True, False)) for n in (0, 1)]
    dataset = SampleDataset(listed, 16, 16)
    dataset.hold_features({"pooled": torch.arange(4).view(2, 2), "mask": torch.eye(2) > 0})
    item = dataset[1]  # the image file does not exist
    assert item["features"]["pooled"].tolist() == [2, 3]
    assert item["mask"].tolist() == [False, True]
    assert "image" not in item
    assert item["target"].tolist() == [True, False]
    assert (item["label"], item["index"]) == (True, 1)
