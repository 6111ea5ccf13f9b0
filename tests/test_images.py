from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import save_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomaly_clip.images import (
    ReadRule,
    evenly_spaced,
    highest_value,
    is_image,
    open_image,
    pixel_bands,
    read_header,
    read_image,
)
from anomaly_clip.masks import read_grey, read_mask, solid

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
    with pytest.raises(ValueError, match="floating-point values have no defined range"):
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


@pytest.mark.parametrize("length", [400, 2**31 - 1, 2**32 - 1])
def test_a_chunk_longer_than_the_file_is_not_allocated(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_deep(tmp_path / "a.png", DEEP)
    content = path.read_bytes()
    assert read_image(path, ReadRule(12)).shape == (*DEEP.shape[:2], 3)
    place = content.index(b"IDAT") - 4
    path.write_bytes(content[:place] + struct.pack(">L", length) + content[place + 4 :])
    monkeypatch.setattr("cv2.imdecode", None)  # it would allocate the length
    with pytest.raises(ValueError, match=r"cannot be decoded \(a part of it is longer than"):
        read_image(path, ReadRule(12))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", [0, 8, 9, 11, 4096])
def test_the_header_turns_as_the_image_does(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(RAMP), exif=exif)
    assert read_header(path).size == read_image(path).shape[1::-1]
    assert read_header(path).turned is (orientation == 8)


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


# -- 16 bits per channel ---------------------------------------------------------------------------

DEEP = np.random.default_rng(1).integers(0, 4096, (37, 23, 3), dtype=np.uint16)


def save_deep(path: Path, values: np.ndarray) -> Path:
    """Save 16-bit values ``(H, W)`` or ``(H, W, 3 or 4)`` in RGB order by OpenCV."""
    order = {2: values, 3: values[..., [2, 1, 0, *range(3, values.shape[-1])]]}[values.ndim]
    encoded = cv2.imencode(path.suffix, order)[1]
    path.write_bytes(encoded.tobytes())
    return path


def expected_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return np.floor(values / (2**bits - 1) * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
@pytest.mark.parametrize("bits", [12, 14])
def test_colours_of_a_camera_are_scaled_by_its_bits(tmp_path: Path, suffix: str, bits: int) -> None:
    path = save_deep(tmp_path / f"a.{suffix}", DEEP)
    assert read_header(path).deep
    assert np.array_equal(read_image(path, ReadRule(bits)), expected_8_bits(DEEP, bits))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("bits", [12, 16])
def test_grey_of_a_camera_is_scaled_by_its_bits(tmp_path: Path, suffix: str, bits: int) -> None:
    path = save_deep(tmp_path / f"a.{suffix}", DEEP[..., 0])
    image = read_image(path, ReadRule(bits))
    assert np.array_equal(image[..., 0], expected_8_bits(DEEP[..., 0], bits))
    assert np.array_equal(image[..., 0], image[..., 2])


def test_transparency_of_16_bits_is_dropped(tmp_path: Path) -> None:
    opaque = np.dstack([DEEP, np.full(DEEP.shape[:2], 9, np.uint16)])
    path = save_deep(tmp_path / "a.png", opaque)
    assert np.array_equal(read_image(path, ReadRule(12)), expected_8_bits(DEEP, 12))


def test_the_high_byte_of_16_bit_colours_is_kept(tmp_path: Path) -> None:
    values = DEEP * 16
    assert np.array_equal(read_image(save_deep(tmp_path / "a.png", values)), values >> 8)


def test_values_above_the_bit_depth_are_refused(tmp_path: Path) -> None:
    for suffix, values in (("png", DEEP), ("tiff", DEEP), ("pgm", DEEP[..., 0])):
        path = save_deep(tmp_path / f"a.{suffix}", values)
        with pytest.raises(ValueError, match=rf"a\.{suffix}: its values reach .* data\.bit_depth"):
            read_image(path, ReadRule(10))


def test_a_declared_depth_needs_no_option(tmp_path: Path) -> None:
    grey = DEEP[..., 0]
    declared = tmp_path / "a.pgm"
    declared.write_bytes(b"P5\n23 37\n4095\n" + grey.astype(">u2").tobytes())
    for bits in (10, 12, 16):
        image = read_image(declared, ReadRule(bits))[..., 0].astype(int)
        assert np.abs(image - expected_8_bits(grey, 12)).max() <= 1
    assert not read_header(declared).deep


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("bits", [12, 16])
def test_deep_images_are_upright(tmp_path: Path, orientation: int, bits: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = saved(tmp_path / "g.png", Image.fromarray(DEEP[..., 0]), exif=exif)
    turned = read_image(grey, ReadRule(bits))
    eight = saved(
        tmp_path / "e.png", Image.fromarray(expected_8_bits(DEEP[..., 0], bits)), exif=exif
    )
    assert np.array_equal(turned, read_image(eight))
    assert read_header(grey).size == turned.shape[1::-1]
    assert read_header(grey).deep


@pytest.mark.parametrize("orientation", [3, 6])
def test_16_bit_colours_are_upright(tmp_path: Path, orientation: int) -> None:
    path = save_deep(tmp_path / "a.png", DEEP)
    content, exif = path.read_bytes(), Image.Exif()
    exif[0x0112] = orientation
    body = b"eXIf" + exif.tobytes()[6:]  # without the prefix of JPEG
    chunk = struct.pack(">L", len(body) - 4) + body + struct.pack(">L", zlib.crc32(body))
    path.write_bytes(content[:33] + chunk + content[33:])
    turns = {3: 2, 6: -1}[orientation]
    assert np.array_equal(read_image(path), np.rot90(DEEP >> 8, turns))
    assert np.array_equal(
        read_image(path, ReadRule(12)), np.rot90(expected_8_bits(DEEP, 12), turns)
    )


def tiff(values: np.ndarray, planar: int, orientation: int = 1) -> bytes:
    """Return an uncompressed TIFF of 16-bit colours, written by hand."""
    height, width, channels = values.shape
    stored = values if planar == 1 else np.moveaxis(values, -1, 0)
    pixels = np.ascontiguousarray(stored).astype("<u2").tobytes()
    strips = 1 if planar == 1 else channels
    size = len(pixels) // strips
    after = 8 + len(pixels)
    long_values = [8 + size * n for n in range(strips)], [size] * strips
    tables = struct.pack(f"<{channels}H", *[16] * channels)
    offsets = [after, after + len(tables)]
    tables += b"".join(struct.pack(f"<{strips}L", *part) for part in long_values)
    offsets.append(offsets[1] + 4 * strips)
    places = [long_values[0][0], long_values[1][0]] if strips == 1 else offsets[1:]
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, offsets[0]),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, strips, places[0]),
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, strips, places[1]),
        (284, 3, 1, planar),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4)
    return struct.pack("<2sHL", b"II", 42, after + len(tables)) + pixels + tables + directory


def test_separate_planes_of_16_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(DEEP, planar=1))
    assert np.array_equal(read_image(path, ReadRule(12)), expected_8_bits(DEEP, 12))
    path.write_bytes(tiff(DEEP, planar=2))
    for bits in (12, 16):
        with pytest.raises(ValueError, match=r"a\.tif: a TIFF with separate planes of 16 bits"):
            read_image(path, ReadRule(bits))


def test_16_bit_colours_of_a_turned_tiff_are_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(DEEP, planar=1, orientation=6))
    expected = np.rot90(expected_8_bits(DEEP, 12), k=-1)
    assert np.array_equal(read_image(path, ReadRule(12)), expected)
    assert np.array_equal(read_image(path), np.rot90(DEEP >> 8, k=-1))
    assert read_header(path).size == (37, 23)


def test_pixels_of_16_bits_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    path = save_deep(tmp_path / "a.png", DEEP)
    assert np.array_equal(np.concatenate(list(pixel_bands(path))), DEEP)
    assert highest_value(path) == DEEP.max()
    plain = saved(tmp_path / "b.png", Image.fromarray(RAMP))
    assert np.array_equal(np.concatenate(list(pixel_bands(plain))), read_image(plain))


# -- limits ----------------------------------------------------------------------------------------


def test_large_images_are_read_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL's own limit does not apply
    paths = [saved(tmp_path / f"a.{s}", Image.fromarray(RAMP.repeat(9, 0))) for s in ("png", "tif")]
    for path in paths:
        assert read_image(path).shape == (36, 6, 3)
        assert Image.MAX_IMAGE_PIXELS == 50
        for read in (read_image, open_image):
            with pytest.raises(ValueError, match=r"6 x 36 .* data\.max_pixels 215: raise it"):
                read(path, ReadRule(max_pixels=215))
        with pytest.raises(ValueError, match=r"data\.max_pixels"):
            read_mask(path, max_pixels=215)


def test_a_long_text_in_a_png_is_no_obstacle(tmp_path: Path) -> None:
    texts = PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP), pnginfo=texts)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(path)
    assert np.array_equal(read_image(path)[..., 0], RAMP)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_the_first_of_several_frames_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    options: dict[str, Any] = {"webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert read_header(path).frames == 3
    assert np.array_equal(read_image(path), np.asarray(frames[0]))


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
    palette = Image.frombytes("P", DRAWN.T.shape, DRAWN.astype(np.uint8).tobytes())
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


def test_decoders_write_nothing_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression="tiff_deflate")
    Image.fromarray(pixels).save(tmp_path / "b.tif", compression="tiff_lzw")
    cv2.imwrite(str(tmp_path / "c.png"), pixels.astype(np.uint16) * 257)
    for file in sorted(tmp_path.iterdir()):
        content = bytearray(file.read_bytes())
        for place in range(200, len(content) - 300, 40):
            content[place] ^= 255
        file.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_image(file, ReadRule(12))
    os.write(2, b"after")  # the output is restored
    assert capfd.readouterr().err == "after"
