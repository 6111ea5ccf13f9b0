"""Masks by the rule of their data set: grey level, small differences in size, leniency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_picture, write_mvtec
from layouts import blob, btad, clinic_db, isic, ksdd2, visa
from PIL import Image

from anomaly_clip.commands.preview import contact_sheet
from anomaly_clip.data import (
    BTAD,
    ISIC,
    KSDD2,
    AnomalyData,
    CVCClinicDB,
    ImageFolder,
    MetaJSON,
    MVTecAD,
    Sample,
    VisA,
)
from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.mask_files import fits, mismatch, read_fitted_mask, upright_size
from anomaly_clip.data.samples import SampleDataset


@pytest.mark.parametrize(
    ("mask", "image", "fitting"),
    [
        ((100, 100), (100, 100), True),
        ((102, 98), (100, 100), True),
        ((103, 100), (100, 100), False),
        ((100, 97), (100, 100), False),
        ((41, 40), (40, 40), False),  # 2 % of 40 are less than a pixel
        ((1000, 998), (1000, 1000), True),
        ((1000, 997), (1000, 1000), False),
    ],
)
def test_differences_of_own_masks(
    mask: tuple[int, int], image: tuple[int, int], fitting: bool
) -> None:
    assert fits(mask, image, MaskRule(fitted=2, fitted_share=0.02)) is fitting
    assert fits(mask, image, MaskRule()) is (mask == image)


def test_sizes_are_described_with_the_likely_cause(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", np.zeros((40, 60, 3), np.uint8))
    assert upright_size(image) == (60, 40)
    texts = {
        (20, 30): ": make the sizes equal",
        (30, 20): ", exactly 2 times as large: enlarge the mask by the nearest pixel",
        (240, 160): ", so the mask is exactly 4 times as large: reduce it by the nearest pixel",
        (40, 60): ", so the mask lies on its side: turn it by 90 degrees",
    }
    for size, text in texts.items():
        begin = f"the mask is {size[0]} x {size[1]} pixels, but its image a.png is 60 x 40"
        assert mismatch(size, image, (60, 40)) == begin + text
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(image).save(image, exif=exif)
    assert upright_size(image) == (40, 60)
    assert "turned by its EXIF orientation" in mismatch((60, 40), image, (40, 60))


def test_a_fitted_mask_is_the_nearest_pixel(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (102, 99), dtype=np.uint8) * np.uint8(255)
    file = save_picture(tmp_path / "m.png", mask)
    read = read_fitted_mask(file, tmp_path / "a.png", (100, 100), MaskRule(fitted=2))
    nearest = Image.fromarray(mask).resize((100, 100), Image.Resampling.NEAREST)
    assert np.array_equal(read, np.asarray(nearest) > 0)


def test_a_lenient_rule_leaves_out_what_cannot_be_used(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", size=40)
    for name, mask in (("size", blob()), ("missing", None), ("damaged", blob())):
        file = tmp_path / f"{name}.png"
        if mask is not None:
            save_picture(file, mask)
        if name == "damaged":
            file.write_bytes(b"x")
        sample = Sample(image, "plank", True, file)
        assert "mask" not in SampleDataset([sample], 16, 16, mask_rule=MaskRule(lenient=True))[0]
        with pytest.raises((OSError, ValueError)):
            SampleDataset([sample], 16, 16)[0]


def folder(root: Path) -> Path:
    """Write a user's folder whose masks are next to the folders of images."""
    rng = np.random.default_rng(0)
    for name in ("good/a", "cut/b", "cut/c"):
        save_picture(root / f"{name}.png", rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    for name in "bc":
        save_picture(root / "masks" / f"{name}.png", blob())
    return root


def meta(root: Path) -> Path:
    (root / "meta.json").parent.mkdir(parents=True, exist_ok=True)
    folder(root)
    entries = ", ".join(
        f'{{"img_path": "cut/{n}.png", "mask_path": "masks/{n}.png", "cls_name": "part", '
        f'"specie_name": "cut", "anomaly": 1}}'
        for n in "bc"
    )
    (root / "meta.json").write_text(f'{{"train": {{}}, "test": {{"part": [{entries}]}}}}')
    return root


SETS: list[tuple[type[AnomalyData], Callable[[Path], Path]]] = [
    (MVTecAD, write_mvtec),
    (VisA, visa),
    (BTAD, btad),
    (KSDD2, ksdd2),
    (ISIC, isic),
    (CVCClinicDB, clinic_db),
    (ImageFolder, folder),
    (MetaJSON, meta),
]


def masks_of(data: AnomalyData) -> dict[str, torch.Tensor]:
    dataset = data.dataset("test")
    items = [dataset[row] for row in range(len(dataset))]
    return {item["path"]: item["mask"] for item in items if item["label"]}


@pytest.mark.parametrize(("kind", "make"), SETS)
def test_the_level_of_masks_holds_for_every_data_set(
    kind: Any, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Every reader of masks follows it: tensors, drawings, labels, and the cache of images."""
    root = make(tmp_path / "set")
    sizes = {"image_size": 24, "mask_size": 48, "mask_filter": "nearest"}
    clean = kind(str(root), **sizes)
    files = {s.mask for s in clean.samples("test") if s.mask is not None}
    for file in files:
        mask = np.asarray(Image.open(file).convert("L"))
        save_picture(file, np.where(mask > 0, 200, 0).astype(np.uint8))
    expected = masks_of(clean)
    assert expected
    for file in files:  # grey noise everywhere, up to the level
        mask = np.asarray(Image.open(file))
        save_picture(file, np.where(mask > 0, 200, 100).astype(np.uint8))
    for cache in (False, True, True):
        noisy = kind(str(root), mask_level=100, cache=cache, **sizes)
        masks = masks_of(noisy)
        assert masks.keys() == expected.keys()
        assert all(torch.equal(masks[path], expected[path]) for path in masks)
    if not clean.info.mask.grey:  # whose rule is the half of white
        without = masks_of(kind(str(root), cache=True, **sizes))  # from the same cache
        assert all(mask.all() for mask in without.values())
    read = noisy.reader()
    drawn = [read(sample)[1] for sample in noisy.samples("test") if sample.label]
    assert all(mask is not None and 0 < mask.mean() < 1 for mask in drawn)
    assert noisy.protocol()["mask_level"] == 100
    assert "mask_level" not in clean.protocol()


def test_the_level_of_masks_on_a_contact_sheet(tmp_path: Path) -> None:
    root = folder(tmp_path)
    save_picture(root / "masks" / "b.png", np.full((20, 24), 100, np.uint8))
    low, high = (contact_sheet(ImageFolder(str(root), "x", mask_level=n)) for n in (99, 100))
    assert (low == 255).mean() > (high == 255).mean()


def test_own_images_in_a_published_layout(mvtec_root: Path, tmp_path: Path) -> None:
    assert not MVTecAD(str(mvtec_root)).is_own
    assert MVTecAD(str(mvtec_root)).mask_rule == MaskRule()
    (mvtec_root / "bottle").rename(mvtec_root / "my part")
    assert not MVTecAD(str(mvtec_root)).is_own  # metal_nut is a published category
    (mvtec_root / "metal_nut").rename(mvtec_root / "my nut")
    data = MVTecAD(str(mvtec_root))
    assert data.is_own
    assert data.mask_rule == MaskRule(fitted=2, fitted_share=0.02)
    assert not KSDD2(str(ksdd2(tmp_path / "ksdd2"))).is_own
    assert ImageFolder(str(mvtec_root), "x").is_own


@pytest.mark.parametrize("ending", ["_gt", "_label", "_Mask", "_GT", ""])
def test_the_usual_endings_in_the_layout_of_mvtec(mvtec_root: Path, ending: str) -> None:
    expected = masks_of(MVTecAD(str(mvtec_root), image_size=16))
    for file in list(mvtec_root.rglob("*_mask.png")):
        file.rename(file.with_name(file.name.replace("_mask", ending)))
    masks = masks_of(MVTecAD(str(mvtec_root), image_size=16))
    assert all(torch.equal(masks[path], expected[path]) for path in expected)
    assert len(masks) == len(expected) == 4
