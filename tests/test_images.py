from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.images import (
    evenly_spaced,
    is_image,
    open_image,
    read_grey,
    read_image,
    read_mask,
    solid,
)

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
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
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)
    assert np.array_equal(read_image(path)[..., 0], np.rot90(RAMP, k=-1))


def test_files_are_read_by_content_not_suffix(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP))
    assert read_image(path.rename(tmp_path / "a.JPG")).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"hello", "not an image in a known format"),
        (None, "cannot be decoded"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = save_picture(tmp_path / "bad image.png", size=200)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=rf"bad image\.png: .*{message}"):
        read_image(path)


def test_a_missing_file_and_an_undefined_range(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png: there is no such file"):
        read_image(tmp_path / "a.png")
    floating = saved(tmp_path / "f.tif", Image.fromarray(np.ones((3, 3), dtype=np.float32)))
    with pytest.raises(ValueError, match="values of mode F have no defined range"):
        read_image(floating)


@pytest.mark.parametrize("value", [1, 255])
def test_mask_pixels_above_zero_are_defective(tmp_path: Path, value: int) -> None:
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1, 2] = value
    expected = mask > 0
    three = np.repeat(mask[..., None], 3, axis=2)
    opaque = np.dstack([three, np.full((4, 4), 255, dtype=np.uint8)])
    for name, array in (("grey", mask), ("rgb", three), ("rgba", opaque)):
        path = saved(tmp_path / f"{name}.png", Image.fromarray(array))
        assert np.array_equal(read_mask(path), expected), name


def test_stray_files_are_not_images() -> None:
    names = ["a.PNG", "b.jpeg", "._a.png", "Thumbs.db", "license.txt"]
    assert [is_image(Path(name)) for name in names] == [True, True, False, False, False]


def test_damaged_exif_data_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise TypeError("bad operand type for abs(): 'str'")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", damaged)
    image = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    assert np.array_equal(read_image(saved(tmp_path / "a.png", image)), np.asarray(image))


def test_masks_of_unusual_modes_are_defective_where_not_black(tmp_path: Path) -> None:
    values = np.zeros((6, 8), np.uint8)
    values[1:3, 2:5] = 255
    grey = Image.fromarray(values)
    for mode, suffix in (("CMYK", "tif"), ("LA", "png"), ("RGBA", "png"), ("P", "png")):
        path = saved(tmp_path / f"{mode}.{suffix}", grey.convert("RGB").convert(mode))
        assert np.array_equal(read_mask(path), values > 0), mode


def test_grey_masks_keep_the_values_of_their_first_channel(tmp_path: Path) -> None:
    three = np.dstack([RAMP, RAMP // 2, RAMP // 3])
    mask = read_grey(saved(tmp_path / "m.png", Image.fromarray(three)))
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, RAMP)


def test_mask_values_above_half_are_solid() -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    assert solid(grey).tolist() == [[False, False, True, True]]
    assert solid(grey > 0).tolist() == [[False, True, True, True]]


def test_open_image_and_read_image_agree(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP))
    assert np.array_equal(np.asarray(open_image(path)), read_image(path))


@pytest.mark.parametrize(
    ("count", "total", "places"),
    [
        (1, 9, [0]),
        (2, 9, [0, 8]),
        (4, 10, [0, 3, 6, 9]),
        (3, 4, [0, 2, 3]),  # 1.5 is rounded to even
        (9, 3, [0, 1, 2]),
        (3, 0, []),
    ],
)
def test_places_are_spread_from_the_first_to_the_last(
    count: int, total: int, places: list[int]
) -> None:
    assert evenly_spaced(count, total) == places


DRAWN = np.zeros((6, 8), bool)
DRAWN[1:3, 2:5] = True


@pytest.mark.parametrize(
    ("background", "drawn"),
    [
        ((255, 255, 255, 0), (0, 0, 0, 255)),  # black on a transparent white layer
        ((0, 0, 0, 0), (0, 0, 0, 255)),
        ((255, 255, 255, 0), (255, 255, 255, 255)),
        ((255, 255, 255, 0), (255, 0, 0, 255)),
        ((0, 0, 0, 0), (0, 200, 0, 90)),  # half transparent
        ((0, 0, 0, 255), (255, 255, 255, 255)),  # alpha is opaque: read from the colours
        ((0, 0, 0, 7), (255, 255, 255, 7)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_masks_drawn_on_a_transparent_layer(
    tmp_path: Path, background: tuple[int, ...], drawn: tuple[int, ...], suffix: str
) -> None:
    pixels = np.empty((6, 8, 4), np.uint8)
    pixels[:], pixels[DRAWN] = background, drawn
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"m.{suffix}", Image.fromarray(pixels), **options)
    assert np.array_equal(read_mask(path), DRAWN)
    if suffix == "png" and len({*background[:3], *drawn[:3]}) < 3:
        grey = saved(tmp_path / "la.png", Image.fromarray(pixels).convert("LA"))
        assert np.array_equal(read_mask(grey), DRAWN)


def test_visible_pixels_of_several_colours_count_above_black(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[0] = (255, 255, 255, 0)  # a transparent frame
    pixels[DRAWN] = (255, 255, 255, 255)
    assert np.array_equal(read_mask(saved(tmp_path / "m.png", Image.fromarray(pixels))), DRAWN)


def test_a_transparent_layer_without_any_drawing_is_an_empty_mask(tmp_path: Path) -> None:
    blank = Image.new("RGBA", (8, 6), (255, 255, 255, 0))
    assert not read_mask(saved(tmp_path / "m.png", blank)).any()


def test_palette_masks_with_a_transparent_entry(tmp_path: Path) -> None:
    palette = Image.fromarray(DRAWN.astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # black on white
    assert not np.array_equal(read_mask(saved(tmp_path / "a.png", palette)), DRAWN)
    assert np.array_equal(read_mask(saved(tmp_path / "b.png", palette, transparency=0)), DRAWN)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 127, 128, 255]], np.uint8),
        np.array([[0, 127 * 257, 128 * 257, 65535]], np.uint16),
        np.array([[0, 127, 128, 255]], np.uint16),  # 8 bits in a file of 16
        np.array([[0, 127, 128, 255]], np.int32),
        np.array([[0, 0.49, 0.51, 1]], np.float32),
    ],
)
def test_the_level_of_a_mask_is_a_grey_level_of_8_bits(tmp_path: Path, values: Any) -> None:
    path = saved(tmp_path / "m.tif", Image.fromarray(values))
    assert read_mask(path, 127).tolist() == [[False, False, True, True]]
    assert read_mask(path).tolist() == [[False, True, True, True]]
    assert read_mask(path, 254).tolist() == [[False, False, False, True]]


def test_bits_are_above_every_level(tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        path = saved(tmp_path / f"m.{suffix}", Image.fromarray(DRAWN))
        assert np.array_equal(read_mask(path, 254), DRAWN)
        assert np.array_equal(read_mask(path), DRAWN)
    white_is_zero = Image.fromarray(DRAWN)  # the other polarity of TIFF, which Pillow decodes
    path = saved(tmp_path / "w.tif", white_is_zero, tiffinfo={262: 0})
    assert np.array_equal(read_mask(path), DRAWN)
