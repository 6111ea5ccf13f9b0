"""Images on which an exported program is compared with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.reading_errors import UnreadableError
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.demo.photographs import CATEGORIES, draw_photograph
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError
from anomaly_clip.image_inputs import ImageInputs
from anomaly_clip.images import evenly_spaced

__all__ = [
    "GENERATED",
    "ParityImages",
    "generated_images",
    "images_of_check",
    "images_of_folder",
]

GENERATED = "generated"
"""Source of images that nobody has given."""
MAX_SCORED = 200
"""Images of a folder of which those nearest the threshold are chosen."""
SIDES = (4 / 3, 5 / 3)
"""Height and width of generated images, as multiples of the side of the square: they are resized,
and not square, as photographs are."""
NARROW = (6 / 5, 2 / 5)
"""Height and width of some images in ``check/``: one side is reduced, the other one enlarged."""
NOISE = 40
"""Largest noise of a pixel in ``check/``, in levels of 255."""


@dataclass(frozen=True, eq=False)
class ParityImages:
    """Images as a program takes them, and before they were made square.

    Args:
        square: uint8 ``(N, 3, S, S)``.
        originals: RGB ``(H, W, 3)`` each.
        source: Where they are from: :data:`GENERATED`, or a folder.
    """

    square: NDArray[np.uint8]
    originals: list[NDArray[np.uint8]]
    source: str = GENERATED


def generated_images(detector: Detector, count: int) -> ParityImages:
    """Draw photographs of made-up products, every second one with a defect.

    Args:
        detector: The detector, whose size and resize rule are used.
        count: Number of images.
    """
    originals = _photographs(detector, count, [SIDES])
    return ParityImages(_squares(detector, originals), originals)


def images_of_check(detector: Detector, count: int) -> ParityImages:
    """Draw photographs with noise in each pixel, which show small differences of decoders.

    Versions of Pillow that resize most images alike differ by one level in narrow ones.

    Args:
        detector: The detector, whose size and resize rule are used.
        count: Number of images.
    """
    rng = np.random.default_rng(0)
    originals = []
    for image in _photographs(detector, count, [SIDES, NARROW]):
        noise = rng.integers(-NOISE, NOISE + 1, image.shape)
        originals.append(np.clip(image + noise, 0, 255).astype(np.uint8))
    return ParityImages(_squares(detector, originals), originals)


def images_of_folder(detector: Detector, folder: Path, count: int) -> ParityImages:
    """Read images of a folder: those with scores nearest the threshold, if there is one.

    Args:
        detector: The detector.
        folder: Folder of images.
        count: Number of images.

    Raises:
        UserError: If none of them can be read.
    """
    name, decisions = detector.resolve()
    inputs = ImageInputs(folder, name)
    paths = [source.path for source in inputs.sources if source.path is not None]
    paths = [paths[place] for place in evenly_spaced(MAX_SCORED, len(paths))]
    predictions = [p for p in detector.predict(paths) if p.error is None]
    if not predictions:
        raise UserError(f"--data.root {folder}: none of its images can be read: correct the path")
    if decisions is None:
        chosen = [predictions[place] for place in evenly_spaced(count, len(predictions))]
    else:
        [level] = decisions.levels.values()
        chosen = sorted(predictions, key=lambda p: abs(p.score - level.threshold))[:count]
    files = [Path(prediction.path or "") for prediction in chosen]
    inputs = ImageInputs(files, name)
    bits, _ = inputs.depth(detector.preprocessing.bit_depth)
    dataset = inputs.dataset(detector.method.image_size, detector.preprocessing, bits)
    try:
        originals = [source.read() for source in inputs.sources]
        batch = dataset.collate([dataset[place] for place in range(len(files))])
    except UnreadableError as error:
        raise UserError(error.reason) from None
    return ParityImages(batch["image"].numpy(), originals, str(folder))


def _photographs(
    detector: Detector, count: int, shapes: Sequence[tuple[float, float]]
) -> list[NDArray[np.uint8]]:
    """Draw photographs.

    Args:
        detector: The detector.
        count: Number of photographs.
        shapes: Height and width as multiples of the side of the square, which take turns.
    """
    side, names = detector.method.image_size, sorted(CATEGORIES)
    originals = []
    for index in range(count):
        height, width = (max(1, round(side * part)) for part in shapes[index % len(shapes)])
        defect = "stain" if index % 2 else None  # which every product can have
        drawn = draw_photograph(
            names[index % len(names)], 0, index, defect, max(64, height, width)
        ).image
        originals.append(drawn[:height, :width])
    return originals


def _squares(detector: Detector, originals: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    side, resize = detector.method.image_size, detector.preprocessing.resize
    squares = [resize_image(Image.fromarray(image), side, resize) for image in originals]
    return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))
