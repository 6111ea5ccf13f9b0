from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.data.transforms import MaskFilter, Resize, resize_image, resize_mask
from anomaly_clip.images import is_image, read_image, read_mask

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


def test_images_are_resized_by_pil_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_image(image, 16), np.asarray(expected))


def test_downsizing_is_antialiased() -> None:
    """A one-pixel checkerboard becomes grey; without antialiasing it would stay black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = resize_image(np.repeat(board[..., None], 3, axis=2), 8)
    assert abs(small.astype(int) - 127).max() <= 2


def test_equal_sizes_pass_untouched() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert resize_image(image, 8) is image


@pytest.mark.parametrize(
    ("kind", "threshold", "expected"),
    [("bilinear", 0.5, 2), ("nearest", 0.5, 2), ("bilinear", 0.9, 1)],
)
def test_masks_are_thresholded(kind: MaskFilter, threshold: float, expected: int) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :5] = True  # to 4 pixels: full, full, half and half of the next weighed in, empty
    small = resize_mask(mask, 4, kind, threshold)
    assert small.dtype == bool
    assert (small.sum(axis=1) >= expected).all()
    assert not small[:, 3].any()


def test_a_tiny_defect_vanishes_from_a_bilinear_mask() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[3, 3] = True
    assert not resize_mask(mask, 8).any()


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (33, 47), (20, 20)])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "lanczos"])
def test_crops_are_torchvisions(shape: tuple[int, int], kind: str) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as reference

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture, mode = Image.fromarray(image), InterpolationMode(kind)
    for rule, size in (("square_crop", [21, 21]), ("shorter_crop", [21])):
        wanted = reference.center_crop(reference.resize(picture, size, mode), [16, 16])
        ours = resize_image(image, 16, Resize(rule, 21, kind))  # type: ignore[arg-type]
        assert np.array_equal(ours, np.asarray(wanted))


def test_grey_masks_keep_their_values_until_the_threshold() -> None:
    mask = np.full((8, 8), 100, np.uint8)
    mask[:, 4:] = 160
    assert not resize_mask(mask, 8, threshold=0.5)[:, :4].any()
    assert resize_mask(mask, 8, threshold=0.5)[:, 4:].all()
    assert resize_mask(mask, 8, threshold=0.3).all()


def test_damaged_exif_data_say_nothing_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise TypeError("bad operand type for abs(): 'str'")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", damaged)
    picture = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    assert np.array_equal(read_image(saved(tmp_path / "a.png", picture)), np.asarray(picture))


def test_masks_of_odd_modes_count_what_is_not_black(tmp_path: Path) -> None:
    values = np.zeros((6, 8), np.uint8)
    values[1:3, 2:5] = 255
    grey = Image.fromarray(values)
    for mode, suffix in (("CMYK", "tif"), ("LA", "png"), ("RGBA", "png"), ("P", "png")):
        path = saved(tmp_path / f"{mode}.{suffix}", grey.convert("RGB").convert(mode))
        assert np.array_equal(read_mask(path), values > 0), mode


@pytest.mark.parametrize("size", range(16, 25))
def test_crops_begin_where_torchvisions_do(size: int) -> None:
    """Whatever is left over: of an odd rest torchvision rounds the half to the even pixel."""
    from torchvision.transforms.functional import center_crop

    image = np.arange(size * (size + 3), dtype=np.uint8).reshape(size, size + 3)
    expected = np.asarray(center_crop(Image.fromarray(image), [16, 16]))
    resize = Resize("shorter_crop", size)
    assert np.array_equal(resize_image(np.dstack([image] * 3), 16, resize)[..., 0], expected)
    square = image[:, :size]
    mask = square > 100
    cut = np.asarray(center_crop(Image.fromarray(mask), [16, 16]))
    assert np.array_equal(resize_mask(mask, 16, resize=Resize("square_crop", size)), cut)
