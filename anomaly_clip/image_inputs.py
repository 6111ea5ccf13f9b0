"""Images that a caller gives to a detector: paths, folders, PIL images and arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from anomaly_clip.data.folder_forms import read_selection, understand
from anomaly_clip.data.path_selection import WILDCARDS, PathSelection
from anomaly_clip.data.reading import chosen_depth, read_headers
from anomaly_clip.data.reading_errors import PredictionImages, ReadingGuard
from anomaly_clip.data.samples import Sample, SampleDataset
from anomaly_clip.images import ReadRule, open_image
from anomaly_clip.preprocessing import Preprocessing
from anomaly_clip.progress import number_of

__all__ = ["ImageInput", "ImageInputs", "ImageSource"]

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""One image: a path, a PIL image, or an array ``(H, W, 3)`` or ``(H, W)``, uint8."""

UNUSED, NO_IMAGES = "not used: ", "files that are not images"
"""Parts of remarks on a folder."""
IN_MEMORY = Path("<images>")
"""Folder of the names that images without a file have in messages."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """One image of a call, which can be decoded again for a drawing.

    Args:
        image: What the caller gave, or a file of a folder that the caller gave.
        rule: Settings of decoding a file.
    """

    image: ImageInput
    rule: ReadRule = field(default_factory=ReadRule)

    @property
    def path(self) -> Path | None:
        """The file; None for an image in memory."""
        is_path = isinstance(self.image, str | os.PathLike)
        return Path(cast("str", self.image)).expanduser() if is_path else None

    def read(self) -> NDArray[np.uint8]:
        """Decode the image as RGB ``(H, W, 3)``, the right way up.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be decoded.
        """
        if self.path is not None:
            return np.asarray(open_image(self.path, self.rule))
        if isinstance(self.image, Image.Image):
            return _decoded(self.image)
        array = np.ascontiguousarray(self.image)
        return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)


def _decoded(image: Image.Image) -> NDArray[np.uint8]:
    """Return a PIL image as its file would be decoded: converted, and turned by its EXIF data.

    Raises:
        ValueError: If its file, which may be read only now, cannot be decoded.
    """
    with suppress(Exception):  # damaged EXIF data do not make the image unusable
        image = ImageOps.exif_transpose(image)
    try:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the PIL image cannot be decoded ({error}); replace its file") from None


class ImageInputs:
    """The images of one call, checked as far as that does not need their pixels.

    Args:
        images: A path, a PIL image or an array; a folder, a pattern, or an iterable of these.
        category: Category of the images.

    Raises:
        FileNotFoundError: If a single path does not exist, or a pattern matches nothing.
        ValueError: If something is not an image, or a folder has none.
    """

    def __init__(self, images: Any, category: str) -> None:
        self.category = category
        self.is_single = False
        self.remarks: list[str] = []
        """Remarks on images of a folder that are not used."""
        self.deep: list[Path] = []
        """Files with 16 bits per channel; see :meth:`depth`."""
        self._sizes: dict[Path, tuple[int, int]] = {}
        # Copies, because cameras write into the same array again and again.
        self.sources = [
            ImageSource(image.copy() if isinstance(image, np.ndarray) else image)
            for image in self._listed(images)
        ]
        self.samples = [
            Sample(source.path or IN_MEMORY / str(number), category, label=False)
            for number, source in enumerate(self.sources)
        ]

    def _listed(self, images: Any) -> list[ImageInput]:
        if isinstance(images, str | os.PathLike):
            _check(images, "the image")
            return self._at(Path(os.fsdecode(images)).expanduser())
        if isinstance(images, Image.Image | np.ndarray) or not _is_several(images):
            _check(images, "the image")
            self.is_single = True
            return [cast("ImageInput", images)]
        listed = list(images)
        for number, image in enumerate(listed):
            _check(image, f"image {number} of the list")
        return listed

    def _at(self, path: Path) -> list[ImageInput]:
        """Return the images of a folder or a pattern, or a single path."""
        if path.is_dir():
            form = understand(path, self.category)
            samples = [*form.train, *form.labelled, *form.unlabelled]
            unused = [remark for remark in form.remarks if remark.startswith(UNUSED)]
            self.remarks = [f"{path}: {remark}" for remark in unused if NO_IMAGES not in remark]
        elif not path.exists() and set(WILDCARDS) & set(str(path)):
            try:
                selected = PathSelection([str(path)]).find()
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(str(error).removeprefix("data.root ")) from None
            samples = read_selection(path.parent, self.category, selected, str(path)).unlabelled
        else:
            if not path.exists():
                raise FileNotFoundError(f"{path}: there is no such file; correct the path")
            self.is_single = True
            return [path]
        if not samples:
            raise ValueError(f"{path}: there is no image in this folder: correct the path")
        paths: list[ImageInput] = [*sorted(sample.image for sample in samples)]
        return paths

    @property
    def has_files(self) -> bool:
        """True if an image is a file."""
        return any(source.path is not None for source in self.sources)

    def depth(self, stored: int | None) -> tuple[int | None, str | None]:
        """Return the bit depth of the files with 16 bits per channel, None without such files.

        Args:
            stored: The bit depth of the fit or of the settings; None: chosen from these files.

        Returns:
            The bit depth, and a remark on how it was chosen, if it was.
        """
        files = [source.path for source in self.sources if source.path is not None]
        headers = read_headers(files)
        self.deep = deep = [path for path, header in headers.items() if header.deep]
        if not deep or stored is not None:
            return (stored if deep else None), None
        chosen = chosen_depth(deep)
        if chosen is None:  # none can be decoded, which is reported when they are read
            return None, None
        images = number_of(len(deep), "image")
        return chosen[0], f"{images} with 16 bits per channel: {chosen[0]} are used ({chosen[1]})"

    def dataset(
        self, image_size: int, preprocessing: Preprocessing, bit_depth: int | None
    ) -> PredictionImages:
        """Return the images as tensors, by the data layer's own code.

        Args:
            image_size: Side of the square images, in pixels.
            preprocessing: Settings of decoding and resizing.
            bit_depth: Significant bits of images with 16 bits per channel; None: all.
        """
        rule = ReadRule(bit_depth or 16, preprocessing.max_pixels)
        self.sources = [ImageSource(source.image, rule) for source in self.sources]
        in_memory = {
            sample.image: source
            for sample, source in zip(self.samples, self.sources, strict=True)
            if source.path is None
        }

        def read(sample: Sample) -> tuple[NDArray[np.uint8], None]:
            source = in_memory.get(sample.image) or ImageSource(sample.image, rule)
            image = source.read()
            self._sizes[sample.image] = image.shape[:2]
            return image, None

        return PredictionImages(
            SampleDataset(
                self.samples,
                image_size,
                image_size,
                has_masks=False,
                guard=ReadingGuard(read),
                reading=rule,
                read=read,
                resize=preprocessing.resize,
            )
        )

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image that was read."""
        return self._sizes[self.samples[index].image]


def _is_several(images: Any) -> bool:
    single = (bytes, bytearray, memoryview, Mapping, torch.Tensor, io.IOBase)
    return isinstance(images, Iterable) and not isinstance(images, single)


def _check(image: Any, name: str) -> None:
    """Check the type of an image, and the shape and the type of the values of an array.

    Raises:
        ValueError: If it is not an image; the message tells how to convert it.
    """
    if isinstance(image, str | os.PathLike):
        if not os.fspath(image):
            raise ValueError(f"{name} has an empty path: name a file, or a folder of images")
    elif isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(
                f"{name} is a PIL image of mode {image.mode}, whose range is unknown: give the "
                f"path of its file, or convert it to 8 bits by the range of the camera"
            )
        if 0 in image.size:
            raise ValueError(f"{name} is empty, {image.width} x {image.height} pixels: give pixels")
    elif isinstance(image, np.ndarray):
        _check_array(image, name)
    else:
        kind = type(image).__name__
        way_out = {
            "Tensor": "give image.permute(1, 2, 0).cpu().numpy() of a uint8 tensor (3, H, W)",
            "bytes": "open them with PIL, as in Image.open(io.BytesIO(content))",
            "list": "give one flat list of images",
        }.get(kind, "give one of these, or a list of them")
        if isinstance(image, io.IOBase):
            way_out = "open it with PIL, as in Image.open(file)"
        raise ValueError(
            f"{name} is {kind}, but a path, a PIL image, or a uint8 array (H, W, 3) is needed: "
            f"{way_out}"
        )


def _check_array(array: NDArray[Any], name: str) -> None:
    shape = array.shape
    problem = f"{name} is an array {shape} of {array.dtype}, but uint8 (H, W, 3) is needed"
    if array.dtype != np.uint8:
        way_out = "convert it to values from 0 to 255"
        if np.issubdtype(array.dtype, np.floating):
            way_out = "of values from 0 to 1, give (array * 255).round().astype(numpy.uint8)"
        elif array.dtype.kind in "UO":
            way_out = "for several images, give list(array)"
        elif array.dtype == np.uint16:
            way_out = "save it as a PNG of 16 bits, and give its path"
        raise ValueError(f"{problem}: {way_out}")
    if array.ndim == 4:
        raise ValueError(f"{problem}: for a batch, give list(array)")
    if array.ndim == 3 and shape[2] != 3:
        ways_out = {1: "give array[..., 0]", 4: "leave out alpha, as in array[..., :3]"}
        first = "give array.transpose(1, 2, 0)" if shape[0] == 3 else "give RGB or grey values"
        raise ValueError(f"{problem}: {ways_out.get(shape[2], first)}")
    if array.ndim not in (2, 3):
        raise ValueError(f"{problem}: give RGB or grey values")
    if array.size == 0:
        raise ValueError(f"{problem}: it is empty, so give one with pixels")
