"""Formats of image files, recognised by content."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.image_formats import FIRST_BYTES, describe_content, format_of, is_image
from anomaly_clip.images import read_image

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)

FORMATS = {
    "png": "PNG",
    "jfif": "JPEG",
    "jpe": "JPEG",
    "dib": "DIB",
    "gif": "GIF",
    "webp": "WEBP",
    "tif": "TIFF",
    "ppm": "PPM",
    "jp2": "JPEG2000",
    "sgi": "SGI",
    "qoi": "QOI",
    "tga": "TGA",
    "pcx": "PCX",
    "avif": "AVIF",
}
WRITERS = {"jfif": "JPEG", "jpe": "JPEG"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_extension_of_a_known_format_is_an_image(tmp_path: Path, suffix: str) -> None:
    writer = WRITERS.get(suffix, FORMATS[suffix])
    Image.init()
    if writer not in Image.SAVE:
        pytest.skip(f"this build of PIL does not write {writer}")
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOURS).save(path, writer)
    assert format_of(path.read_bytes()[:FIRST_BYTES], f".{suffix}") == FORMATS[suffix]
    assert is_image(path)
    with Image.open(path) as opened:
        assert np.array_equal(read_image(path), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("name", ["a", "a.dat", "a.IMG_0001"])
def test_no_extension_is_needed(tmp_path: Path, name: str) -> None:
    Image.fromarray(COLOURS).save(tmp_path / name, "PNG")
    assert is_image(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name), COLOURS)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n", b"8BPS\0\1"])
@pytest.mark.parametrize("name", ["a.png", "a.eps", "a"])
def test_other_decoders_of_pil_are_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a decoder was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    path = tmp_path / name
    path.write_bytes(content + b"%%BoundingBox: 0 0 9 9\n" * 9)
    assert is_image(path) == (name == "a.png")  # so that it is reported
    with pytest.raises(ValueError, match=r"not an image but a (PostScript|PDF|Photoshop) file"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"P7 is not read", "not an image in a known format"),
        (b"P5bits", "not an image in a known format"),
    ],
)
def test_files_that_take_the_place_of_images_are_named(content: bytes, description: str) -> None:
    assert format_of(content, ".png") is None
    assert description in describe_content(content)


def test_camera_raw_files_are_no_images(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.tif")
    for suffix in ("dng", "NEF", "cr2"):
        raw = tmp_path / f"a.{suffix}"
        raw.write_bytes((tmp_path / "a.tif").read_bytes())  # only its preview could be read
        assert not is_image(raw)


def test_special_files_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "text").write_text("hello")
    for name in ("folder", "pipe", "link", "text", "missing"):
        assert not is_image(tmp_path / name), name
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match="a folder or special file"):
            read_image(tmp_path / name)


def test_heif_names_the_package_that_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64))
    assert is_image(path)
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"needs the package pillow-heif"):
            read_image(path)
    else:
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_image(path)
