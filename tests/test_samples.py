from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_picture
from torch.utils.data import default_collate

from anomaly_clip.data import (
    MVTecAD,
    Resize,
    Sample,
    SampleDataset,
)


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


def test_pixel_labels_are_absent_where_there_are_none(tmp_path: Path) -> None:
    sample = Sample(save_picture(tmp_path / "a.png"), "thing", label=True)
    assert "mask" not in SampleDataset([sample], 16, 16, has_masks=False)[0]


def test_a_mask_of_another_size_names_both(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", size=40)
    mask = save_picture(tmp_path / "a_mask.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.raises(
        ValueError, match=r"a_mask\.png: the mask is 6 x 4 pixels, its image a\.png is 40"
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
    assert not cut["mask"].any()  # the crop removed it,
    assert cut["label"]  # and it stays abnormal
