"""Inputs of the soak's fuzz: small files of each kind, and what is done to them."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from safetensors.torch import save as save_safetensors

__all__ = ["damaged", "damaged_json", "damaged_text", "images", "packed", "replaced", "weights"]

SIDE = (13, 11)
LARGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x10000000, 0x00FFFFFF, 65535, 65536, 20000, 0)

Bytes = Callable[[random.Random, bytes], bytes]


# -- bytes -----------------------------------------------------------------------------------------


def damaged(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Return content with one to three changes.

    Args:
        rng: Source of the changes.
        content: A valid file.
        others: Valid files to splice in.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(CHANGES)
        content = (
            change(rng, content)
            if change is not _spliced
            else _spliced(rng, content, rng.choice(others))
        )
    return _repaired_png(content) if rng.random() < 0.5 else content


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _flipped(rng: random.Random, content: bytes) -> bytes:
    values = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        if values:
            values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
    return bytes(values)


def _overwritten(rng: random.Random, content: bytes) -> bytes:
    place = rng.randint(0, len(content))
    count = rng.choice((1, 2, 4, 16))
    new = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", rng.randbytes(1))) * count
    return content[:place] + new + content[place + count :]


def _enlarged(rng: random.Random, content: bytes) -> bytes:
    """Let a number at the beginning, such as a width, claim a huge size."""
    form = rng.choice(("<I", ">I", "<H", ">H"))
    value = rng.choice(LARGE)
    number = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    place = rng.randint(0, min(len(content), 64))
    return content[:place] + number + content[place + len(number) :]


def _doubled(rng: random.Random, content: bytes) -> bytes:
    first, last = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:last] + content[first:]


def _removed(rng: random.Random, content: bytes) -> bytes:
    first, last = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:first] + content[last:]


def _spliced(rng: random.Random, content: bytes, other: bytes = b"") -> bytes:
    return content[: rng.randint(0, len(content))] + other[rng.randint(0, len(other)) :]


CHANGES: tuple[Bytes, ...] = (
    _cut,
    _flipped,
    _flipped,
    _overwritten,
    _enlarged,
    _enlarged,
    _doubled,
    _removed,
    _spliced,
)


def _repaired_png(content: bytes) -> bytes:
    """Return a PNG whose checksums fit its chunks, so that the decoder continues; others as is."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        body = content[place + 4 : place + 8 + length]
        end = place + 12 + length
        if end > len(content):
            break
        parts += [content[place : place + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        place = end
    return b"".join([*parts, content[place:]])


# -- images ----------------------------------------------------------------------------------------


@cache
def images() -> list[tuple[str, bytes]]:
    """Return valid images of each format that is read, with the extension of their files."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (SIDE[1], SIDE[0], 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (SIDE[1], SIDE[0]), dtype=np.uint16))
    real = Image.fromarray(rng.random((SIDE[1], SIDE[0]), dtype=np.float32))
    modes = {mode: colours.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK")}
    modes |= {"I;16": deep, "F": real}
    turned = Image.Exif()
    turned[0x0112] = 6
    requests: list[tuple[str, str, dict[str, Any]]] = [
        *((mode, "png", {}) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")),
        ("RGB", "png", {"exif": turned}),
        *((mode, "jpeg", {}) for mode in ("L", "RGB", "CMYK")),
        ("RGB", "jpeg", {"progressive": True, "exif": turned}),
        *((mode, "bmp", {}) for mode in ("1", "L", "P", "RGB")),
        *((mode, "tiff", {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F")),
        *(("RGB", "tiff", {"compression": c}) for c in ("tiff_lzw", "tiff_deflate", "packbits")),
        ("I;16", "tiff", {"compression": "tiff_lzw"}),
        ("RGB", "tiff", {"compression": "jpeg"}),
        ("RGB", "tiff", {"save_all": True, "append_images": [colours]}),
        *((mode, "ppm", {}) for mode in ("1", "L", "RGB", "I;16")),
        ("P", "gif", {}),
        ("P", "gif", {"save_all": True, "append_images": [colours.rotate(90)]}),
        *((mode, "tga", {}) for mode in ("L", "RGB", "P")),
        ("RGB", "tga", {"compression": "tga_rle"}),
        *((mode, "pcx", {}) for mode in ("1", "L", "P", "RGB")),
        *((mode, "sgi", {}) for mode in ("L", "RGB")),
        *((mode, "dib", {}) for mode in ("L", "RGB")),
    ]
    if features.check("webp"):
        requests += [("RGB", "webp", {}), ("RGBA", "webp", {"lossless": True})]
    if features.check("jpg_2000"):
        requests += [("RGB", "jp2", {}), ("L", "jp2", {})]
    if features.check("avif"):
        requests += [("RGB", "avif", {})]
    files = []
    for mode, form, options in requests:
        file = io.BytesIO()
        modes[mode].save(file, form if form != "jp2" else "jpeg2000", **options)
        files.append((form, file.getvalue()))
    files += [("png", _png16(rng)), ("qoi", _qoi(colours)), ("ppm", _ppm16(rng))]
    return [*files, ("tiff", _tiff16(rng))]


def _png16(rng: np.random.Generator) -> bytes:
    import cv2

    values = rng.integers(0, 65536, (SIDE[1], SIDE[0], 3), dtype=np.uint16)
    return bytes(cv2.imencode(".png", values)[1])


def _tiff16(rng: np.random.Generator) -> bytes:
    import cv2

    values = rng.integers(0, 65536, (SIDE[1], SIDE[0], 3), dtype=np.uint16)
    return bytes(cv2.imencode(".tiff", values)[1])


def _ppm16(rng: np.random.Generator) -> bytes:
    values = rng.integers(0, 65536, (SIDE[1], SIDE[0], 3), dtype=np.uint16).astype(">u2")
    return b"P6\n%d %d\n65535\n" % SIDE + values.tobytes()


def _qoi(image: Image.Image) -> bytes:
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    body = b"".join(b"\xfe" + bytes(pixel.tolist()) for pixel in pixels)
    return b"qoif" + struct.pack(">IIBB", *SIDE, 3, 0) + body + b"\0" * 7 + b"\1"


# -- archives --------------------------------------------------------------------------------------


def packed(members: dict[str, bytes], rng: random.Random) -> bytes:
    """Return a zip file; sometimes with a member that is damaged, under a right checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@cache
def weights() -> list[tuple[str, bytes]]:
    """Return valid checkpoints and weights files, with the extension of their names."""
    tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(3), "n": torch.tensor(4)}
    checkpoint = {
        "state_dict": tensors,
        "hyper_parameters": {"_class_path": "anomaly_clip.methods.SDP", "lr": 0.1, "names": ["a"]},
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": "2.5.0",
        "loops": {"fit_loop": {"epoch_progress": {"total": 1}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    files = []
    for content, suffix in ((tensors, "pt"), (checkpoint, "ckpt")):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            files.append((suffix, file.getvalue()))
    half = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(1, dtype=torch.bfloat16)}
    files += [("safetensors", save_safetensors(tensors)), ("safetensors", save_safetensors(half))]
    return files


# -- text ------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    -1e-320,
    float("nan"),
    float("inf"),
    10**30,
    10**400,
    2**63,
    "",
    " ",
    "a\nb",
    "\x00",
    "\ud800",
    "é" * 3,
    "x" * 5000,
    "=1+1",
    "../../etc",
    "/dev/null",
    "NaN",
    "${env}",
    [],
    {},
    [None],
    [[]],
    {"": 0},
    {"a": {"b": []}},
    [0] * 300,
]
"""Values in the place of others."""


def replaced(rng: random.Random, content: Any) -> Any:
    """Return plain values with one to three of them replaced, removed or moved."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return deepcopy(rng.choice(ODD))
        owner, key = rng.choice(places)
        how = rng.random()
        if how < 0.6:
            owner[key] = deepcopy(rng.choice(ODD))
        elif how < 0.75:
            del owner[key]
        elif how < 0.9:
            other, name = rng.choice(places)
            try:
                owner[key] = json.loads(json.dumps(other[name]))
            except (LookupError, ValueError):
                continue
        elif isinstance(owner, dict):
            owner[str(rng.choice(ODD))] = owner.pop(key)
        else:
            owner.extend([owner[key]] * rng.choice((1, 50)))
    return content if rng.random() < 0.97 else deepcopy(rng.choice(ODD))


def _places(content: Any) -> list[tuple[Any, Any]]:
    places, stack = [], [content]
    while stack:
        value = stack.pop()
        keys = (
            value
            if isinstance(value, dict)
            else range(len(value) if isinstance(value, list) else 0)
        )
        places += [(value, key) for key in keys]
        stack += [value[key] for key in keys]
    return places


def damaged_json(rng: random.Random, content: Any) -> bytes:
    """Return JSON with odd values, or its text with changes."""
    if rng.random() < 0.75:
        return json.dumps(replaced(rng, content), ensure_ascii=rng.random() < 0.7).encode(
            "utf-8", "surrogatepass"
        )
    text = json.dumps(content, indent=rng.choice((None, 1)))
    if rng.random() < 0.5:
        return damaged_text(rng, text)
    return damaged(rng, text.encode(), [b'{"a": [1, 2', b"[" * 2000])


WORDS = (
    "&a [*a]", "&a", "*a", "!!timestamp x", "!!binary =", "!!python/object/apply:os.getcwd []",
    "!!float x", "!!int 0x", "<<: 1", "? [a]", ": ", "- ", "{", "}", "[", "]", "'", '"', "|", ">",
    "\t", "#", "%YAML 9.9", "---", "...", "\ufeff", "null", "~", "1e999", "-.inf", ".nan", "0o9",
    "1:2:3", "2001-99-99", "9" * 400, "\u2028", "\x07", "=", "yes", "[" * 300, "{a: " * 150,
)  # fmt: skip
"""Words that are special in YAML."""


def damaged_text(rng: random.Random, text: str) -> bytes:
    """Return text with one to three changes of its lines and words."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        row = rng.randrange(len(lines))
        line = lines[row]
        how = rng.randrange(9)
        if how == 0:
            del lines[row]
            lines = lines or [""]
        elif how == 1:
            lines.insert(row, rng.choice(lines))
        elif how == 2:
            lines[row] = line.partition(":")[0] + ": " + rng.choice(WORDS)
        elif how == 3:
            lines[row] = line.partition(":")[0] + ": " + str(rng.choice(ODD))
        elif how == 4:
            lines[row] = " " * rng.randrange(9) + line.strip()
        elif how == 5:
            place = rng.randint(0, len(line))
            lines[row] = line[:place] + rng.choice(WORDS) + line[place:]
        elif how == 6:
            place = rng.randint(0, len(line))
            lines[row] = (
                line[:place] + chr(rng.choice((0, 9, 127, 233, 0xFFFE, 0x1F600))) + line[place:]
            )
        elif how == 7:
            lines[row] = line[: rng.randint(0, len(line))]
        else:
            other = rng.randrange(len(lines))
            lines[row], lines[other] = lines[other], line
    text = "\n".join(lines)
    encoding = rng.choice(("utf-8",) * 18 + ("utf-16", "latin-1"))
    return text.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace")
