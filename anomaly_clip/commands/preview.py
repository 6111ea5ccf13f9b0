"""``anomaly_clip preview``: a contact sheet of a data set, to look at before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

import anomaly_clip.data  # noqa: F401  (short names work for classes that are imported)
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.synthetic import SyntheticDataset
from anomaly_clip.errors import translated
from anomaly_clip.files import atomic_path
from anomaly_clip.progress import track

__all__ = ["contact_sheet", "defect_sheet", "run_preview"]

Chosen = TypeVar("Chosen")

CELL = 160
LINE = 14
GAP = 6
SHOWN = 256  # pixels of images with synthetic defects, unless the data say otherwise


def run_preview(words: Sequence[str]) -> int:
    """Draw a contact sheet as the command line says and return an exit code.

    Raises:
        UserError: What is wrong, where, and the way out.
    """
    parser = LightningArgumentParser(
        prog="anomaly_clip preview",
        description="Draw a contact sheet of a data set: pictures with their masks; with "
        "--data.synthesis, normal training pictures with their defects, masks and labels.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a file with a section data")
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    parser.add_argument("--split", type=Split, default="test", help="which split; defects: train")
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
        if data.synthesis is None:
            sheet = contact_sheet(data, config.split, config.count)
        else:
            sheet = defect_sheet(data, config.count)
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
    chosen = [samples[place] for place in _spread(len(samples), count)]

    def panels(sample: Sample) -> tuple[str, list[NDArray[np.uint8]]]:
        image, mask = read(sample)
        if not data.has_masks:
            return _caption(sample), [image]
        white = np.zeros(image.shape[:2], dtype=bool) if mask is None else mask
        grey = white.astype(np.uint8) * (1 if white.dtype == np.uint8 else 255)
        return _caption(sample), [image, _three(grey)]

    return _sheet(chosen, panels, 2 if data.has_masks else 1)


def defect_sheet(data: AnomalyData, count: int = 48) -> NDArray[np.uint8]:
    """Return normal training images spread evenly over the listing, each with a synthetic defect.

    Args:
        data: A data set with ``synthesis``; without an image size, images are as large as the
            sheet shows them.
        count: How many pictures at most.

    Returns:
        RGB ``(H, W, 3)``: the image, the image with its defect, the mask, the label.
    """
    assert data.synthesis is not None
    data.image_size = data.image_size or SHOWN
    dataset = data.fit_dataset()
    assert isinstance(dataset, SyntheticDataset)

    def panels(row: int) -> tuple[str, list[NDArray[np.uint8]]]:
        image, made = dataset.shown(row)
        some = "" if made.mask.any() else ", none"
        caption = f"{dataset.samples[row].category}: {made.info['recipe']}{some}"
        label = (made.label / max(1.0, float(made.label.max())) * 255).astype(np.uint8)
        mask = made.mask.astype(np.uint8) * 255
        return caption, [image, made.image, _three(mask), _three(label)]

    return _sheet(_spread(len(dataset), count), panels, 4)


def _spread(number: int, count: int) -> list[int]:
    """Return as many places, spread evenly."""
    places = np.linspace(0, number - 1, min(count, number)).round().astype(int)
    return [int(place) for place in places]


def _three(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2)


def _sheet(
    chosen: Sequence[Chosen],
    panels: Callable[[Chosen], tuple[str, list[NDArray[np.uint8]]]],
    number: int,
) -> NDArray[np.uint8]:
    """Draw what was chosen, each with a caption and so many panels, on a sheet about square."""
    width = CELL * number
    columns = max(1, min(len(chosen), round((len(chosen) * (CELL + LINE) / width) ** 0.5)))
    rows = -(-len(chosen) // columns)
    size = (columns * (width + GAP) + GAP, rows * (CELL + LINE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    font = ImageFont.load_default(LINE - 3)
    draw = ImageDraw.Draw(sheet)
    for place, one in enumerate(track(chosen, "drawing")):
        left = GAP + (place % columns) * (width + GAP)
        top = GAP + (place // columns) * (CELL + LINE + GAP)
        caption, shown = panels(one)
        for position, panel in enumerate(shown):
            cell = ImageOps.pad(Image.fromarray(panel), (CELL, CELL), color="white")
            sheet.paste(cell, (left + position * CELL, top + LINE))
        draw.text((left, top), caption, "black", font)
    return np.asarray(sheet)


def _caption(sample: Sample) -> str:
    return f"{sample.category}: {sample.defect}" if sample.defect else sample.image.name
