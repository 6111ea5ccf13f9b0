from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image
from torch.utils.data import default_collate

from anomaly_clip.data import MVTecAD, SampleDataset, read_image, read_mask
from anomaly_clip.data.dataset import Sample, is_image

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(RAMP)))
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert all(np.array_equal(image[..., channel], RAMP) for channel in range(3))


def test_sixteen_bits_keep_the_range_of_the_format(tmp_path: Path) -> None:
    deep = RAMP.astype(np.uint16) * 257
    for suffix in ("png", "tif"):
        image = read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(deep)))
        assert np.array_equal(image[..., 0], RAMP), suffix


def test_palette_and_transparency(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 3), dtype=np.uint8)
    colours[:2] = (255, 0, 0)
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert np.array_equal(read_image(saved(tmp_path / "p.png", palette)), colours)
    alpha = np.dstack([colours, np.full((4, 4), 7, dtype=np.uint8)])
    assert np.array_equal(read_image(saved(tmp_path / "a.png", Image.fromarray(alpha))), colours)


def test_black_and_white(tmp_path: Path) -> None:
    bits = saved(tmp_path / "a.png", Image.fromarray(RAMP > 100))
    assert np.array_equal(read_image(bits)[..., 1], (RAMP > 100) * 255)


def test_cmyk(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK")
    image = read_image(saved(tmp_path / "a.jpg", red, quality=100))
    assert image.shape == (8, 8, 3)
    assert image[..., 0].min() > 200
    assert image[..., 1:].max() < 50


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)
    assert np.array_equal(read_image(path)[..., 0], np.rot90(RAMP, k=-1))


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP))
    assert read_image(path.rename(tmp_path / "a.JPG")).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"hello", "not an image in a known format"),
        (None, "cannot be decoded"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = save_picture(tmp_path / "bad image.png", size=200)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=rf"bad image\.png: .*{sentence}"):
        read_image(path)


def test_a_missing_file_and_a_range_unknown(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png: there is no such file"):
        read_image(tmp_path / "a.png")
    floating = saved(tmp_path / "f.tif", Image.fromarray(np.ones((3, 3), dtype=np.float32)))
    with pytest.raises(ValueError, match="no known range"):
        read_image(floating)


@pytest.mark.parametrize("value", [1, 255])
def test_any_mask_value_above_zero_counts(tmp_path: Path, value: int) -> None:
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1, 2] = value
    expected = mask > 0
    three = np.repeat(mask[..., None], 3, axis=2)
    opaque = np.dstack([three, np.full((4, 4), 255, dtype=np.uint8)])
    for name, array in (("grey", mask), ("rgb", three), ("rgba", opaque)):
        path = saved(tmp_path / f"{name}.png", Image.fromarray(array))
        assert np.array_equal(read_mask(path), expected), name


def test_hidden_files_are_no_images() -> None:
    names = ["a.PNG", "b.jpeg", "._a.png", "Thumbs.db", "license.txt"]
    assert [is_image(Path(name)) for name in names] == [True, True, False, False, False]


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
    mask = saved(tmp_path / "a_mask.png", Image.fromarray(RAMP))
    with pytest.raises(
        ValueError, match=r"a_mask\.png: the mask is 6 x 4 pixels, its image a\.png is 40"
    ):
        SampleDataset([Sample(image, "thing", True, mask)], 16, 16)[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "data.image_size must be positive"),
        ({"mask_size": -1}, "data.mask_size must be positive"),
        ({"mask_threshold": 1.0}, "data.mask_threshold"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_options_that_do_not_fit(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MVTecAD("root", **options)


def test_without_a_model_the_image_size_must_be_given(mvtec_root: Path) -> None:
    with pytest.raises(ValueError, match="image_size is not known"):
        MVTecAD(str(mvtec_root)).dataset("test")
