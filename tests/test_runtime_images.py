"""Decoding and resizing of the runtime, compared bit by bit with those of the package."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from anomaly_clip.data.transforms import Resize, resize_image
from anomaly_clip.images import ReadRule, open_image
from anomaly_clip.runtime.detector import make_square, read_image, seen_part

LIMIT = 250_000_000
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (37, 23, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (37, 23, 4), dtype=np.uint16)
RGB = Image.fromarray(COLOURS[..., :3])
GREY = Image.fromarray(COLOURS[..., 0])


def png(values: np.ndarray, interlaced: bool = False, orientation: int = 0) -> bytes:
    """Return a PNG of 16 bits per channel, ``(H, W, 1 to 4)``, written by hand."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b""
    for left, top, right, down in passes:
        for row in values[top::down, left::right]:
            raw += b"\0" + np.ascontiguousarray(row).astype(">u2").tobytes()
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">LLBBBBB", width, height, 16, kind, 0, 0, int(interlaced))
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        chunks.insert(1, (b"eXIf", exif.tobytes()[6:]))
    parts = [
        struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, order: str = "<", bits: int = 16, **tags: int) -> bytes:
    """Return an uncompressed TIFF of one strip, written by hand; ``values`` are ``(H, W, C)``.

    Args:
        values: Stored values.
        order: ``<`` or ``>``.
        bits: Bits per sample; 12 are packed.
        tags: Values of tags by number, such as ``t274`` for the orientation.
    """
    height, width, channels = values.shape
    if tags.get("t284") == 2:
        pixels = np.moveaxis(values, -1, 0).astype(f"{order}u2").tobytes()
    elif bits == 12:
        text = "".join(f"{value:012b}" for value in values.ravel())
        pixels = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        pixels = np.ascontiguousarray(values).astype(f"{order}u{bits // 8}").tobytes()
    strips = channels if tags.get("t284") == 2 else 1
    size = len(pixels) // strips
    end = 8 + len(pixels)
    table = struct.pack(f"{order}{channels}H", *[bits] * channels)
    starts = struct.pack(f"{order}{strips}L", *[8 + size * strip for strip in range(strips)])
    sizes = struct.pack(f"{order}{strips}L", *[size] * strips)
    place = end + len(table)
    entries = {
        256: (3, 1, width),
        257: (3, 1, height),
        258: (3, channels, bits if channels == 1 else end),
        259: (3, 1, 1),
        262: (3, 1, 1 if channels == 1 else 2),
        273: (4, strips, 8 if strips == 1 else place),
        277: (3, 1, channels),
        278: (3, 1, height),
        279: (4, strips, size if strips == 1 else place + len(starts)),
    }
    entries |= {int(name[1:]): (3, 1, value) for name, value in tags.items()}
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH" if short else f"{order}L", *([value, 0][: 1 + short]))
        directory += struct.pack(f"{order}HHL", tag, kind, count) + packed
    offset = place + len(starts) + len(sizes)
    head = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, offset)
    return head + pixels + table + starts + sizes + directory + bytes(4)


def encoded(suffix: str, values: np.ndarray, *options: int) -> bytes:
    """Return an image that OpenCV has encoded, from values in RGB order."""
    order = values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[-1]]]
    return cv2.imencode(suffix, order, options)[1].tobytes()


Writer = Callable[[Path], object]


def saved(image: Image.Image, **options: object) -> Writer:
    return lambda path: image.save(path, **options)  # type: ignore[arg-type]


def content(value: bytes) -> Writer:
    return lambda path: path.write_bytes(value)


def turned(image: Image.Image, orientation: int) -> Writer:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, exif=exif)


def palette(**info: object) -> Image.Image:
    image = RGB.quantize(16)
    image.info.update(info)
    return image


FILES: dict[str, Writer] = {
    "rgb.png": saved(RGB),
    "grey.png": saved(GREY),
    "rgba.png": saved(Image.fromarray(COLOURS)),
    "la.png": saved(Image.fromarray(COLOURS).convert("LA")),
    "bits1.png": saved(GREY.convert("1")),
    "bits2.png": saved(palette(), bits=2),
    "palette.png": saved(palette()),
    "palette_transparent.png": saved(palette(), transparency=3),
    "palette_bytes.png": saved(palette(), transparency=bytes(range(16))),
    "grey_transparent.png": saved(GREY, transparency=7),
    "grey16.png": content(png(DEEP[..., :1])),
    "grey16_interlaced.png": content(png(DEEP[..., :1], interlaced=True)),
    "la16.png": content(png(DEEP[..., :2])),
    "la16_turned.png": content(png(DEEP[..., :2], orientation=6)),
    "rgb16.png": content(png(DEEP[..., :3])),
    "rgb16_interlaced.png": content(png(DEEP[..., :3], interlaced=True)),
    "rgba16.png": content(png(DEEP)),
    "rgba16_interlaced.png": content(png(DEEP, interlaced=True)),
    "baseline.jpg": saved(RGB, quality=90),
    "progressive.jpg": saved(RGB, progressive=True),
    "grey.jpg": saved(GREY),
    "cmyk.jpg": saved(RGB.convert("CMYK")),
    "ycck.jpg": content(encoded(".jpg", COLOURS[..., :3])),
    "no_subsampling.jpg": saved(RGB, subsampling=0),
    "mpo.jpg": saved(RGB, format="MPO", save_all=True, append_images=[GREY.convert("RGB")]),
    "colours.bmp": saved(RGB),
    "grey.bmp": saved(GREY),
    "palette.bmp": saved(palette()),
    "bits1.bmp": saved(GREY.convert("1")),
    "colours.gif": saved(RGB),
    "frames.gif": saved(palette(), save_all=True, append_images=[RGB.quantize(4)]),
    "lossy.webp": saved(RGB),
    "lossless.webp": saved(Image.fromarray(COLOURS), lossless=True),
    "colours.avif": saved(RGB),
    "colours.jp2": saved(RGB),
    "grey16.jp2": saved(Image.fromarray(DEEP[..., 0])),
    "colours.qoi": saved(RGB),
    "colours.sgi": saved(RGB),
    "colours.tga": saved(RGB),
    "palette.pcx": saved(palette()),
    "colours.dib": saved(RGB),
    "colours.ppm": saved(RGB),
    "grey.pgm": saved(GREY),
    "bits1.pbm": saved(GREY.convert("1")),
    "ascii.ppm": content(b"P3 2 1 255 1 2 3 4 5 6\n"),
    "rgb16.ppm": content(encoded(".ppm", DEEP[..., :3])),
    "grey16.pgm": content(encoded(".pgm", DEEP[..., 0])),
    "declared.pgm": content(b"P5\n23 37\n4095\n" + DEEP[..., 0].astype(">u2").tobytes()),
    "declared.ppm": content(b"P6\n23 37\n4095\n" + DEEP[..., :3].astype(">u2").tobytes()),
    "colours.tif": saved(RGB),
    "pages.tif": saved(RGB, save_all=True, append_images=[GREY]),
    "cmyk.tif": saved(RGB.convert("CMYK")),
    "bits1.tif": saved(GREY.convert("1"), compression="group4"),
    "palette.tif": saved(palette()),
    "grey16.tif": content(encoded(".tif", DEEP[..., 0])),
    "signed.tif": saved(Image.fromarray(DEEP[..., 0].astype(np.int32))),
    "grey16_big.tif": content(tiff(DEEP[..., :1], ">")),
    "rgb16_little.tif": content(tiff(DEEP[..., :3])),
    "rgb16_big.tif": content(tiff(DEEP[..., :3], ">")),
    "rgba16_little.tif": content(tiff(DEEP, t338=2)),
    "rgba16_big.tif": content(tiff(DEEP, ">", t338=2)),
    "rgbx16.tif": content(tiff(DEEP, t338=0)),
    "grey12.tif": content(tiff(DEEP[..., :1][:36, :22], bits=12)),
    **{
        f"{name}.tif": saved(RGB, compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")
    },
    **{
        f"rgb16_compressed_{number}.tif": content(
            encoded(".tif", DEEP[..., :3], cv2.IMWRITE_TIFF_COMPRESSION, number)
        )
        for number in (1, 5, 8, 32773, 32946)
    },
    **{
        f"rgba16_compressed_{number}.tif": content(
            encoded(".tif", DEEP, cv2.IMWRITE_TIFF_COMPRESSION, number)
        )
        for number in (5, 8)
    },
    **{
        f"turned_{number}.{suffix}": turned(RGB, number)
        for number in (*range(1, 9), 9)
        for suffix in ("jpg", "png", "tif", "webp")
    },
    **{f"turned_{n}_rgb16.png": content(png(DEEP[..., :3], orientation=n)) for n in range(1, 9)},
    **{f"turned_{n}_grey16.png": content(png(DEEP[..., :1], orientation=n)) for n in (3, 6)},
    **{f"turned_{n}_rgb16.tif": content(tiff(DEEP[..., :3], t274=n)) for n in range(1, 9)},
    "png_called.jpg": saved(RGB, format="PNG"),
    "no_suffix": saved(RGB, format="PNG"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FILES)
def test_images_are_decoded_as_by_the_package(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    for bits in (12, 14, 16):
        expected = np.asarray(open_image(path, ReadRule(bits)))
        image = read_image(path, bits, LIMIT)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected), bits


HALF = encoded(".jpg", RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
REFUSED: dict[str, tuple[Writer, str]] = {
    "empty.png": (content(b""), "no image"),
    "text.png": (content(b"hello, this is no image"), "no image"),
    "page.jpg": (content(b"<!doctype html><html></html>"), "no image"),
    "heif.jpg": (content(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)), "save it as PNG"),
    "raw.cr2": (saved(RGB, format="TIFF"), "camera raw"),
    "truncated.jpg": (content(HALF[: len(HALF) // 2]), "truncated"),
    "truncated.png": (content(png(DEEP[..., :3])[:200]), "cannot be read"),
    "truncated.ppm": (content(encoded(".ppm", DEEP[..., :3])[:300]), "cannot be read"),
    "floats.tif": (saved(Image.fromarray(np.zeros((4, 5), np.float32))), "floats"),
    "planes.tif": (content(tiff(DEEP[..., :3], t284=2)), "planes"),
    "negative.tif": (saved(Image.fromarray(np.full((4, 5), -1, np.int32))), "bits end at"),
    "above.png": (content(png(DEEP[..., :1] * 16)), "bits end at 4095"),
    "above_colours.png": (content(png(DEEP[..., :3] * 16)), "bits end at 4095"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_package_refuses_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write, reason = REFUSED[name]
    write(path)
    with pytest.raises(ValueError, match=name):
        open_image(path, ReadRule(12))
    with pytest.raises(ValueError, match=reason) as error:
        read_image(path, 12, LIMIT)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "<_io" not in str(error.value)


def test_folders_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            read_image(tmp_path / name, 16, LIMIT)


def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    header = struct.pack(">LLBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    chunk = struct.pack(">L", 13) + body + struct.pack(">L", zlib.crc32(body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(ValueError, match=r"large.png: cannot be read"):
        read_image(path, 16, LIMIT)
    RGB.save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="more than 850 pixels"):
        read_image(tmp_path / "small.png", 16, 850)
    assert read_image(tmp_path / "small.png", 16, 851).size == (23, 37)


def test_images_of_16_bits_need_a_bit_depth_and_8_bits_do_not(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(DEEP[..., :3]))
    with pytest.raises(ValueError, match=r"16 bits per channel.*give bit_depth"):
        read_image(path, None, LIMIT)
    RGB.save(path)
    read_image(path, None, LIMIT)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("rule", ["square", "square_crop", "shorter_crop"])
@pytest.mark.parametrize("size", [(23, 37), (320, 200), (201, 333), (64, 64), (80, 80)])
def test_images_are_resized_as_in_the_published_code(
    rule: str, kind: str, size: tuple[int, int]
) -> None:
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, side, before = Image.fromarray(pixels), 64, None if rule == "square" else 80
    method = Image.Resampling[kind.upper()]
    if before is None:
        expected = image.resize((side, side), method)
    else:
        shorter = min(size)
        sides = int(before * size[0] / shorter), int(before * size[1] / shorter)
        large = image.resize((before, before) if rule == "square_crop" else sides, method)
        left, top = round((large.width - side) / 2), round((large.height - side) / 2)
        expected = large.crop((left, top, left + side, top + side))
    resize = Resize(rule, before, kind)  # type: ignore[arg-type]
    assert make_square(image, side, rule, before, kind).tobytes() == expected.tobytes()
    assert np.array_equal(resize_image(image, side, resize), np.asarray(expected))
    assert resize.seen(*size, side) == tuple(seen_part(*size, side, rule, before))
