"""``anomaly_clip preview``: a contact sheet of a data set, to look at before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

import anomaly_clip.data  # noqa: F401  (short names work for classes that are imported)
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.errors import translated
from anomaly_clip.files import atomic_path
from anomaly_clip.progress import track

__all__ = ["contact_sheet", "run_preview"]

CELL = 160
LINE = 14
GAP = 6


def run_preview(words: Sequence[str]) -> int:
    """Draw a contact sheet as the command line says and return an exit code.

    Raises:
        UserError: What is wrong, where, and the way out.
    """
    parser = LightningArgumentParser(
        prog="anomaly_clip preview",
        description="Draw a contact sheet of a data set: pictures with their masks.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a file with a section data")
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    parser.add_argument("--split", type=Split, default="test", help="which split to show")
    parser.add_argument("--count", type=int, default=48, help="how many pictures, spread evenly")
    parser.add_argument("--file", type=str, default="preview.png", help="where the sheet goes")
    with translated(lambda: [f"--{action.dest}" for action in parser._actions]):
        config = parser.parse_args(list(words)[1:])
        if config.count < 1:
            raise ValueError(f"--count must be 1 or more, got {config.count}")
        target = Path(config.file)
        if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ValueError(f"--file {target}: expected a name ending in .png or .jpg")
        data: AnomalyData = parser.instantiate(config).data
        sheet = contact_sheet(data, config.split, config.count)
        with atomic_path(target) as temporary:
            Image.fromarray(sheet).save(temporary)
    print(target)
    return 0


def contact_sheet(data: AnomalyData, split: Split = "test", count: int = 48) -> NDArray[np.uint8]:
    """Return pictures spread evenly over a split's listing, each with its mask beside it.

    Args:
        data: The data set.
        split: Which of its splits.
        count: How many pictures at most.

    Returns:
        RGB ``(H, W, 3)``.
    """
    samples, read = data.samples(split), data.reader()
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    chosen = [samples[place] for place in places]
    width = CELL * (2 if data.has_masks else 1)
    columns = max(1, min(len(chosen), round((len(chosen) * (CELL + LINE) / width) ** 0.5)))
    rows = -(-len(chosen) // columns)
    size = (columns * (width + GAP) + GAP, rows * (CELL + LINE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    font = ImageFont.load_default(LINE - 3)
    draw = ImageDraw.Draw(sheet)
    for place, sample in enumerate(track(chosen, "drawing")):
        left = GAP + (place % columns) * (width + GAP)
        top = GAP + (place // columns) * (CELL + LINE + GAP)
        image, mask = read(sample)
        panels = [image]
        if data.has_masks:
            blank = np.zeros(image.shape[:2], dtype=bool)
            white = blank if mask is None else mask
            grey = white if white.dtype == np.uint8 else white.astype(np.uint8) * 255
            panels.append(np.repeat(grey[..., None], 3, axis=2))
        for number, panel in enumerate(panels):
            cell = ImageOps.pad(Image.fromarray(panel), (CELL, CELL), color="white")
            sheet.paste(cell, (left + number * CELL, top + LINE))
        draw.text((left, top), _caption(sample), "black", font)
    return np.asarray(sheet)


def _caption(sample: Sample) -> str:
    return f"{sample.category}: {sample.defect}" if sample.defect else sample.image.name
