"""Stitched training images of APRIL-GAN (arXiv 2305.17382): 2 x 2 images of a category as one.

Objects appear at half their size. Each choice depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.masks import Mask

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.samples import Sample

__all__ = ["Stitching", "check_stitching", "stitched"]

STITCHING = 0x571C  # part of a seed: stitched images have their own stream of random numbers
NUM_IMAGES = 4


def check_stitching(data: AnomalyData) -> None:
    """Check the options ``stitch`` of a data module and of its auxiliary data set.

    Raises:
        ValueError: If one of them has no effect, or there are no masks.
    """
    if data.stitch:
        raise ValueError(
            f"data.stitch {data.stitch} has no effect on the tested data set: set "
            f"data.auxiliary.stitch, which stitches the training images of an auxiliary data set"
        )
    auxiliary = data.auxiliary
    if auxiliary is None or not auxiliary.stitch:
        return
    if not auxiliary.has_masks:
        raise ValueError(
            f"data.auxiliary.stitch {auxiliary.stitch} stitches images with their masks, but "
            f"{auxiliary.dataset_name} has none: leave it out, or choose a data set with masks"
        )


class Stitching:
    """Random replacement of training images by four images of their category.

    As in the public code, each of the four is drawn with replacement: first a kind of defect,
    uniformly and with ``good`` as one of them, then an image of this kind.

    Args:
        samples: Listing of the training images.
        probability: Probability that an image is replaced.
        seed: Seed of the choices.
    """

    def __init__(self, samples: Sequence[Sample], probability: float, seed: int) -> None:
        self.probability = probability
        self.seed = seed
        self.samples = samples
        self.rows: dict[str, dict[str, list[int]]] = {}
        """Rows of the listing by category and kind of defect."""
        for row, sample in enumerate(samples):
            self.rows.setdefault(sample.category, {}).setdefault(sample.defect, []).append(row)

    def drawn(self, epoch: int, row: int) -> list[int] | None:
        """Return the rows of the four images in place of a row; None if it stays as it is."""
        rng = np.random.default_rng([self.seed, STITCHING, epoch, row])
        if rng.random() >= self.probability:
            return None
        kinds = self.rows[self.samples[row].category]
        names = sorted(kinds)
        chosen = [kinds[names[rng.integers(len(names))]] for _ in range(NUM_IMAGES)]
        return [rows[rng.integers(len(rows))] for rows in chosen]


def stitched(
    parts: Sequence[tuple[NDArray[np.uint8] | Image.Image, Mask | None]],
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Paste four images and their masks 2 x 2, row by row.

    The canvas is twice as wide and high as the first image. Larger images are cut off, and the rest
    of smaller ones is black.

    Args:
        parts: RGB images with their masks ``(H, W)``; None for an empty mask.

    Returns:
        The image, and its mask: uint8, 255 = anomalous.
    """
    first = parts[0][0]
    size = first.size if isinstance(first, Image.Image) else first.shape[1::-1]
    width, height = size
    canvas = Image.new("RGB", (2 * width, 2 * height))
    mask_canvas = Image.new("L", canvas.size)
    for number, (image, mask) in enumerate(parts):
        row, column = divmod(number, 2)
        corner = (column * width, row * height)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        canvas.paste(image.crop((0, 0, width, height)), corner)
        if mask is not None:
            values = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
            mask_canvas.paste(Image.fromarray(values).crop((0, 0, width, height)), corner)
    return canvas, np.asarray(mask_canvas)
