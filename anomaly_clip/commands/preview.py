"""``anomaly_clip preview``: a contact sheet of a data set, and its images as a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from anomaly_clip.commands.parsing import data_parser, parse_words
from anomaly_clip.data.auxiliary import take_image_size
from anomaly_clip.data.dataset import AnomalyData, Sample, Split
from anomaly_clip.data.folder_writer import check_new_folder, write_images
from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.data.stitching import check_stitching
from anomaly_clip.data.synthetic import SyntheticDataset
from anomaly_clip.drawing.draw import add_caption, font, grid, save_drawing
from anomaly_clip.errors import check_at_least
from anomaly_clip.files import atomic_path, printable
from anomaly_clip.images import evenly_spaced
from anomaly_clip.progress import number_of, say, track
from anomaly_clip.records import Draw

__all__ = ["augmented_sheet", "contact_sheet", "defect_sheet", "run_preview"]

Item = TypeVar("Item")
Panels = tuple[str, list[NDArray[np.uint8]]]
"""Caption, and the images below it."""

CELL = 160
LINE_HEIGHT = 14
GAP = 6
UNREADABLE = 1
"""Exit code if some images could not be read."""
SHOWN_SIZE = 256  # image side in pixels for training images, if data.image_size is unset
NUM_VERSIONS = 4  # augmented versions shown of each image


def run_preview(words: Sequence[str]) -> int:
    """Draw the contact sheet specified by the arguments and return an exit code.

    Raises:
        UserError: If the command line or the data set is invalid.
    """
    parser = data_parser(
        "preview",
        "Draw a contact sheet of a data set: images with their masks. With --data.synthesis: "
        "normal training images, each with a synthetic defect, its mask and its per-pixel label. "
        "With --data.augment or --data.auxiliary.stitch: training images, each next to its "
        "versions in the first epochs. With --images: also writes all images as PNG files into a "
        "folder that ImageFolder reads.",
    )
    parser.add_argument(
        "--split",
        type=Split | None,
        help="split to draw, default: test (--data.synthesis, --data.augment and "
        "--data.auxiliary.stitch always draw the images of a fit); or to write with --images, "
        "default: all",
    )
    parser.add_argument("--count", type=int, default=48, help="number of images, evenly spaced")
    parser.add_argument("--file", type=str, default="preview.png", help="output image")
    parser.add_argument(
        "--images",
        type=str | None,
        help="new folder for the images: good/, a folder per kind of defect, and masks in "
        "ground_truth/; a folder of these per category, if there are several",
    )
    with parse_words(parser, words) as config:
        check_at_least("--count", config.count, 1)
        target = Path(config.file)
        if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ValueError(f"--file {target}: expected a name ending in .png or .jpg")
        data: AnomalyData = parser.instantiate(config).data
        data.unreadable.keeps_all = True
        unreadable: list[UnreadableError] = []
        source = data if data.auxiliary is None else data.auxiliary
        changes = data.augmentation is not None or bool(source.stitch)
        trains = data.synthesis is not None or changes
        check_stitching(data)
        if config.images is not None:
            if trains:
                raise ValueError(
                    f"--images {config.images} writes the images of the data set as they are: "
                    f"leave --data.synthesis, --data.augment and --data.auxiliary.stitch out"
                )
            check_new_folder(config.images, data)
        if trains:
            data.begin_fit()
        split: Split = config.split or ("test" if "test" in data.splits else "train")
        reading = source.reading if trains else data.reading
        reading.prepare(data.fit_samples() if trains else data.samples(split))
        for remark in reading.remarks:
            say(remark)
        left_out: list[UnreadableError] = []
        if config.images is not None:
            _write_folder(data, config.images, config.split, left_out)
        if data.synthesis is not None:
            sheet = defect_sheet(data, config.count, unreadable)
        elif changes:
            sheet = augmented_sheet(data, config.count, unreadable)
        else:
            sheet = contact_sheet(data, split, config.count, unreadable)
        with atomic_path(target) as temporary:
            save_drawing(Image.fromarray(sheet), temporary)
    print(target)
    unreadable = list({error.reason: error for error in [*left_out, *unreadable]}.values())
    if unreadable:
        such_as = ":" if len(unreadable) == 1 else ", such as"
        number = number_of(len(unreadable), "image")
        say(f"{number} could not be read{such_as} {unreadable[0].reason}", style="bold red")
        return UNREADABLE
    return 0


def _write_folder(
    data: AnomalyData, folder: str, split: Split | None, unreadable: list[UnreadableError]
) -> None:
    """Write the images, print the folder, and note how many there are."""
    number = write_images(data, folder, split, unreadable)
    print(folder)
    several = len(data.categories) > 1
    hint = f", in a folder per category, such as {data.categories[0]}" if several else ""
    say(f"{folder}: {number_of(number, 'image')}{hint}")


def contact_sheet(
    data: AnomalyData,
    split: Split = "test",
    count: int = 48,
    unreadable: list[UnreadableError] | None = None,
) -> NDArray[np.uint8]:
    """Draw evenly spaced images of a split, each next to its mask.

    Args:
        data: The data set.
        split: One of its splits.
        count: Maximum number of images.
        unreadable: Receives the errors of images that cannot be read, which are then not drawn;
            default: the first error is raised.

    Returns:
        RGB ``(H, W, 3)``.

    Raises:
        UnreadableError: If an image cannot be read and there is no list for it, or none can be.
    """
    samples, read, guard = data.samples(split), data.reader(), data.unreadable.guard
    shown = [samples[place] for place in evenly_spaced(count, len(samples))]

    def panels(sample: Sample) -> Panels:
        with guard(sample):
            image, mask = read(sample)
        if not data.has_masks:
            return _caption(sample), [image]
        white = np.zeros(image.shape[:2], dtype=bool) if mask is None else mask
        grey = white.astype(np.uint8) * (1 if white.dtype == np.uint8 else 255)
        return _caption(sample), [image, _to_rgb(grey)]

    return _draw_sheet(shown, panels, 2 if data.has_masks else 1, unreadable)


def defect_sheet(
    data: AnomalyData, count: int = 48, unreadable: list[UnreadableError] | None = None
) -> NDArray[np.uint8]:
    """Draw evenly spaced normal training images, each with a synthetic defect.

    Args:
        data: A data set with ``synthesis``; its image size defaults to ``SHOWN_SIZE``.
        count: Maximum number of images.
        unreadable: See :func:`contact_sheet`.

    Returns:
        RGB ``(H, W, 3)``. Per image: the image, the image with its defect, the mask, the label.
    """
    assert data.synthesis is not None
    data.image_size = data.image_size or SHOWN_SIZE
    dataset = data.fit_dataset()
    assert isinstance(dataset, SyntheticDataset)

    def panels(row: int) -> Panels:
        image, synthetic = dataset.shown(row)
        remark = "" if synthetic.mask.any() else ", no defect"
        caption = f"{dataset.samples[row].category}: {synthetic.info['recipe']}{remark}"
        label = (synthetic.label / max(1.0, float(synthetic.label.max())) * 255).astype(np.uint8)
        mask = synthetic.mask.astype(np.uint8) * 255
        return caption, [image, synthetic.image, _to_rgb(mask), _to_rgb(label)]

    return _draw_sheet(evenly_spaced(count, len(dataset)), panels, 4, unreadable)


def augmented_sheet(
    data: AnomalyData, count: int = 48, unreadable: list[UnreadableError] | None = None
) -> NDArray[np.uint8]:
    """Draw evenly spaced training images, each followed by its versions in the first epochs.

    Args:
        data: A data set with ``augment``, or with an auxiliary data set that is stitched; its image
            size defaults to ``SHOWN_SIZE``.
        count: Maximum number of images.
        unreadable: See :func:`contact_sheet`.

    Returns:
        RGB ``(H, W, 3)``: the image, and ``NUM_VERSIONS`` versions.
    """
    take_image_size(data, data.image_size or SHOWN_SIZE)
    dataset = data.fit_dataset()
    assert isinstance(dataset, SampleDataset)
    source = data if data.auxiliary is None else data.auxiliary
    plain = source.as_tensors(dataset.samples)

    def panels(row: int) -> Panels:
        items = [plain[row], *(dataset[Draw(epoch, row)] for epoch in range(NUM_VERSIONS))]
        images = [item["image"].permute(1, 2, 0).contiguous().numpy() for item in items]
        return _caption(dataset.samples[row]), images

    return _draw_sheet(evenly_spaced(count, len(dataset)), panels, 1 + NUM_VERSIONS, unreadable)


def _to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2)


def _draw_sheet(
    items: Sequence[Item],
    panels_of: Callable[[Item], Panels],
    num_panels: int,
    unreadable: list[UnreadableError] | None,
) -> NDArray[np.uint8]:
    """Draw items, each with a caption and ``num_panels`` panels, on a roughly square sheet."""
    width, height = CELL * num_panels, CELL + LINE_HEIGHT
    captions, cells = [], []
    for item in track(items, "drawing"):
        try:
            caption, panels = panels_of(item)
        except UnreadableError as error:
            if unreadable is None or len(unreadable) + 1 == len(items):
                raise
            unreadable.append(error)
            continue
        padded = [ImageOps.pad(Image.fromarray(p), (CELL, CELL), color="white") for p in panels]
        captions.append(caption)
        cells.append(add_caption(grid(padded, num_panels), [], LINE_HEIGHT, above=LINE_HEIGHT))
    columns = max(1, min(len(cells), round((len(cells) * height / width) ** 0.5)))
    sheet = grid(cells, columns, GAP, before=GAP, after=GAP)
    draw = ImageDraw.Draw(sheet)
    # Captions are drawn on the sheet, not on the cells, so that long ones can extend into the gap.
    for number, caption in enumerate(captions):
        row, column = divmod(number, columns)
        place = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        draw.text(place, printable(caption), "black", font(LINE_HEIGHT - 3))
    return np.asarray(sheet)


def _caption(sample: Sample) -> str:
    return f"{sample.category}: {sample.defect}" if sample.defect else sample.image.name
