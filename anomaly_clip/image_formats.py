"""Formats of image files, recognised by the first bytes of a file.

The list of formats is closed: no file can start the interpreters that PIL uses for EPS, PDF and
WMF. The extension of a file decides nothing, except for camera raw files, which begin like TIFF but
contain only a small preview that PIL could read.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "FIRST_BYTES",
    "OWN_SOFTWARE",
    "claims_more_than_it_has",
    "describe_content",
    "format_of",
    "is_image",
    "is_own_drawing",
]

FIRST_BYTES = 64
"""Number of bytes that the functions of this module need."""
OWN_SOFTWARE = "anomaly_clip"
"""Text under ``Software`` in the PNG files of this package."""

IMAGE_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"]
)
RAW_SUFFIXES = frozenset(
    [
        ".3fr",
        ".arw",
        ".cr2",
        ".dng",
        ".erf",
        ".iiq",
        ".kdc",
        ".mef",
        ".mos",
        ".nef",
        ".nrw",
        ".orf",
        ".pef",
        ".raf",
        ".rw2",
        ".rwl",
        ".sr2",
        ".srf",
        ".srw",
    ]
)
"""Extensions of camera raw files."""

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"GIF8", "GIF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"qoif", "QOI"),
    (b"\x01\xda", "SGI"),
    *((b"P%d" % kind, "PPM") for kind in range(1, 7)),
)
"""First bytes and PIL's name of the formats that are read; :func:`format_of` adds some others."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

DIB_HEADERS = [bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124)]
"""First bytes of a bitmap without the header of a file."""

OTHER_CONTENTS = (
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"8BPS", "a Photoshop file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"),
    (b"<!doctype", "a web page, as a failed download leaves it"),
    (b"<html", "a web page, as a failed download leaves it"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch its content with git lfs pull"),
)
"""First bytes, in lower case, of files that are found in the place of images."""


def is_image(path: Path) -> bool:
    """Return whether a file is an image and not hidden.

    A common extension is enough, so that a damaged image is reported and not passed over. Of files
    with other extensions, or with none, the first bytes are read.
    """
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix in RAW_SUFFIXES:
        return False
    if suffix in IMAGE_SUFFIXES:
        return True
    try:
        if not path.is_file():  # opening a named pipe would wait for its other end
            return False
        with path.open("rb") as file:
            return format_of(file.read(FIRST_BYTES), suffix) is not None
    except OSError:
        return False


def format_of(first_bytes: bytes, suffix: str) -> str | None:
    """Return PIL's name of a format; None if it is not in the list.

    Args:
        first_bytes: The first bytes of the file.
        suffix: The extension of the file, in lower case; only for formats without a signature.
    """
    if suffix in RAW_SUFFIXES:
        return None
    for signature, name in SIGNATURES:
        if first_bytes.startswith(signature):
            is_text = name == "PPM" and first_bytes[2:3] not in (b" ", b"\t", b"\r", b"\n")
            return None if is_text else name
    if first_bytes.startswith(b"RIFF") and first_bytes[8:12] == b"WEBP":
        return "WEBP"
    if first_bytes[4:8] == b"ftyp":  # a family of formats, with a list of brands
        if b"avif" in first_bytes or b"avis" in first_bytes:
            return "AVIF"
        return "HEIF" if any(brand in first_bytes for brand in HEIF_BRANDS) else None
    if suffix == ".tga" and first_bytes[2:3] in (b"\x01", b"\x02", b"\x03", b"\x09", b"\x0a"):
        return "TGA"
    if suffix == ".dib" and first_bytes[:4] in DIB_HEADERS:
        return "DIB"
    return "PCX" if suffix == ".pcx" and first_bytes.startswith(b"\x0a") else None


def is_own_drawing(path: Path) -> bool:
    """Return whether a file is a PNG that this package has drawn, such as a heat map."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with path.open("rb") as file:
            return b"Software\x00" + OWN_SOFTWARE.encode() in file.read(FIRST_BYTES)
    except OSError:
        return False


def describe_content(first_bytes: bytes) -> str:
    """Describe a file that is not an image."""
    if not first_bytes:
        return "an empty file"
    start = first_bytes.lstrip().lower()
    for signature, description in OTHER_CONTENTS:
        if start.startswith(signature.lower()):
            return f"not an image but {description}"
    return "not an image in a known format"


def claims_more_than_it_has(content: bytes) -> bool:
    """Return whether a PNG has a chunk that is longer than the file.

    OpenCV allocates the claimed length, up to 4 GB, before it reads the chunk.
    """
    place = 8  # after the signature
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if length > len(content) - place - 8:
            return True
        if content[place + 4 : place + 8] == b"IEND":
            return False
        place += 12 + length
    return False
