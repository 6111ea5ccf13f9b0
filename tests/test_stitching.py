"""Tests of stitched training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Golden, quiet_trainer
from layouts import head_ct
from PIL import Image
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import HeadCT, MVTecAD
from anomaly_clip.data.samples import Sample
from anomaly_clip.data.stitching import Stitching, check_stitching, stitched
from anomaly_clip.data.transforms import resize_image, resize_mask
from anomaly_clip.methods import APRILGAN
from anomaly_clip.records import Draw


@pytest.mark.golden
def test_golden_stitching(golden: Callable[[str], Golden]) -> None:
    arrays = golden("april_gan")
    inputs, expected, size = arrays.inputs, arrays.expected, arrays.meta["image_size"]
    parts = [
        (inputs["e2e.images"][row].numpy(), inputs["e2e.masks"][row].numpy() > 0)
        for row in arrays.meta["stitch"]
    ]
    image, mask = stitched(parts)
    pixels = torch.from_numpy(np.array(resize_image(image, size))).permute(2, 0, 1)
    config, weights = (
        str(arrays.folder / name) for name in ("model_config.json", "state_dict.safetensors")
    )
    tower = CLIPBackbone(config, weights, size)
    assert_close(tower.prepare(pixels[None])[0], expected["stitch.preprocessed"], atol=1e-5, rtol=0)
    square = torch.from_numpy(resize_mask(mask, size))
    assert torch.equal(square, expected["stitch.mask"].bool())


def test_the_first_image_gives_the_size_of_the_canvas() -> None:
    large, small = np.full((30, 40, 3), 9, np.uint8), np.full((8, 8, 3), 5, np.uint8)
    marked = np.ones((30, 40), bool)
    grey = np.full((8, 8), 77, np.uint8)
    parts: Any = [(Image.fromarray(small), None), (large, marked), (small, grey), (small, None)]
    image, mask = stitched(parts)
    assert image.size == (16, 16)
    pixels = np.asarray(image)
    assert (pixels[:8, 8:] == 9).all()
    assert (np.delete(pixels.reshape(-1), 0) > 0).all()
    assert (mask[:8, 8:] == 255).all()
    assert (mask[8:, :8] == 77).all()
    assert mask.astype(int).sum() == 64 * (255 + 77)
    image, _ = stitched([(large, None), *parts[1:]])
    assert image.size == (80, 60)
    assert np.asarray(image)[59, 79].tolist() == [0, 0, 0]  # the small one does not fill its place


def samples() -> list[Sample]:
    """Return 1 good image, 9 with a hole and 2 with a cut of a category, and one of another."""
    kinds = ["good"] + ["hole"] * 9 + ["cut"] * 2
    return [
        *(Sample(Path(f"{n}.png"), "nut", k != "good", None, k) for n, k in enumerate(kinds)),
        Sample(Path("a.png"), "bolt", False),
    ]


def test_kinds_of_defects_are_equally_likely() -> None:
    stitching = Stitching(samples(), 1.0, seed=3)
    rows = [row for epoch in range(300) for row in stitching.drawn(epoch, 5) or []]
    assert len(rows) == 1200
    kinds = Counter(samples()[row].defect for row in rows)
    for kind in ("good", "hole", "cut"):
        assert abs(kinds[kind] / len(rows) - 1 / 3) < 0.04, kinds  # 3 standard deviations
    assert {*rows} == {*range(12)}
    assert stitching.drawn(0, 12) == [12] * 4  # the only image of its category


def test_choices_depend_on_seed_epoch_and_row() -> None:
    stitching = Stitching(samples(), 0.2, seed=0)
    first = [stitching.drawn(epoch, 1) for epoch in range(1000)]
    assert first[:50] == [Stitching(samples(), 0.2, 0).drawn(epoch, 1) for epoch in range(50)]
    assert abs(sum(rows is not None for rows in first) / 1000 - 0.2) < 0.04
    for seed, row in ((1, 1), (0, 2)):
        other = Stitching(samples(), 0.2, seed)
        assert [other.drawn(epoch, row) for epoch in range(50)] != first[:50]
    assert Stitching(samples(), 0.0, seed=0).drawn(0, 1) is None


def test_a_fit_stitches_the_auxiliary_images(mvtec_root: Path) -> None:
    auxiliary = MVTecAD(str(mvtec_root), categories=["bottle"], stitch=0.5)
    data = MVTecAD(str(mvtec_root), categories=["metal_nut"], auxiliary=auxiliary, image_size=32)
    data.setup("fit")
    dataset: Any = data.fit_dataset()
    plain = auxiliary.as_tensors(dataset.samples)
    changed = 0
    for epoch in range(4):
        for row in range(len(dataset)):
            item, before = dataset[Draw(epoch, row)], plain[row]
            rows = dataset.stitching.drawn(epoch, row)
            assert torch.equal(item["image"], before["image"]) == (rows is None)
            assert item["mask"].shape == (32, 32)
            assert item["category"] == "bottle"
            if rows is not None:
                changed += 1
                assert item["label"] == any(dataset.samples[other].label for other in rows)
                assert bool(item["mask"].any()) == item["label"]
                quarter = resize_image(dataset._open(dataset.samples[rows[3]])[0], 16)
                difference = (
                    item["image"][:, 18:30, 18:30].float()
                    - torch.from_numpy(np.array(quarter)).permute(2, 0, 1)[:, 2:14, 2:14]
                )
                assert difference.abs().mean() < 3  # apart from the seams
    assert 0 < changed < 4 * len(dataset)
    assert data.protocol()["stitch"] == 0.5
    assert "fit" not in data.unchanging_datasets()
    without = MVTecAD(str(mvtec_root), auxiliary=MVTecAD(str(mvtec_root)))
    assert "stitch" not in without.protocol()


def test_options_without_effect_are_refused(mvtec_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set data\.auxiliary\.stitch, which stitches"):
        MVTecAD(str(mvtec_root), stitch=0.2, image_size=32).setup("test")
    auxiliary = HeadCT(str(head_ct(tmp_path / "ct")), stitch=0.2)
    with pytest.raises(ValueError, match=r"with their masks, but HeadCT has none"):
        MVTecAD(str(mvtec_root), auxiliary=auxiliary, image_size=32).setup("fit")
    with pytest.raises(ValueError, match=r"data\.stitch must be"):
        MVTecAD(str(mvtec_root), stitch=1.5)
    check_stitching(SimpleNamespace(stitch=0.0, auxiliary=None))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_fit_with_stitching_caches_no_features(
    tiny_clip: CLIPBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    auxiliary = MVTecAD(str(mvtec_root), categories=["bottle"], stitch=1.0, batch_size=4)
    data = MVTecAD(str(mvtec_root), categories=["metal_nut"], auxiliary=auxiliary, num_workers=0)
    method = APRILGAN(tiny_clip)
    quiet_trainer(max_epochs=1).fit(method, data)
    assert not method._cached
    assert not [*tmp_path.glob("cache/features/*")]


@pytest.mark.slow
def test_preview_shows_stitched_images(mvtec_root: Path, tmp_path: Path) -> None:
    words = ["preview", "--data", "MVTecAD", f"--data.root={mvtec_root}"]
    words += ["--data.categories=[bottle]", "--data.auxiliary", "MVTecAD"]
    words += [f"--data.auxiliary.root={mvtec_root}", "--data.auxiliary.stitch", "0.5"]
    assert main([*words, f"--file={tmp_path / 'a.png'}"]) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 5 * 160  # an image and four versions of it
