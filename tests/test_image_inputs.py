"""Images that a caller gives to a detector."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_picture
from PIL import Image

from anomaly_clip.data.transforms import Resize
from anomaly_clip.image_inputs import ImageInputs, ImageSource
from anomaly_clip.images import read_image
from anomaly_clip.preprocessing import Preprocessing

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
FLOATS = NOISE.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FLOATS, r"\(20, 30, 3\) of float32, .*: of values from 0 to 1, give \(array \* 255\)"),
        (FLOATS[..., 0].astype(np.float16), r"of float16, but uint8 \(H, W, 3\) is needed"),
        (NOISE.astype(np.uint16), "of uint16, .*: save it as a PNG of 16 bits, and give its path"),
        (NOISE > 3, "of bool, .*: convert it to values from 0 to 255"),
        (NOISE.astype(object), "of object"),
        (NOISE.transpose(2, 0, 1), r"\(3, 20, 30\) .*: give array.transpose\(1, 2, 0\)"),
        (np.zeros((20, 30, 4), np.uint8), r"leave out alpha, as in array\[..., :3\]"),
        (np.zeros((20, 30, 1), np.uint8), r"give array\[..., 0\]"),
        (np.zeros((20, 30, 2), np.uint8), "give RGB or grey values"),
        (NOISE[None], r"for a batch, give list\(array\)"),
        (NOISE[0, 0], r"\(3,\) of uint8, .*: give RGB or grey values"),
        (np.zeros((0, 30, 3), np.uint8), "it is empty, so give one with pixels"),
        (np.uint8(3), "is uint8, but a path, a PIL image, or a uint8 array"),
        (torch.zeros(3, 4, 4), r"is Tensor, .*: give image.permute\(1, 2, 0\).cpu\(\).numpy\(\)"),
        (b"\x89PNG", r"is bytes, .*: open them with PIL, as in Image.open\(io.BytesIO"),
        (None, "is NoneType, but a path, a PIL image, or a uint8 array"),
        (7, "is int, but a path"),
        ({"image": NOISE}, "is dict, but a path"),
        (io.BytesIO(b"\x89PNG"), r"is BytesIO, .*: open it with PIL, as in Image.open\(file\)"),
        (np.array(["a.png", "b.png"]), r"for several images, give list\(array\)"),
        ("", "has an empty path: name a file, or a folder of images"),
        (Image.new("F", (4, 4)), "a PIL image of mode F, whose range is unknown: give the path"),
        (Image.new("I;16", (4, 4)), "a PIL image of mode I;16, whose range is unknown"),
        (Image.new("RGB", (0, 4)), "is empty, 0 x 4 pixels"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^the image .*{message}"):
        ImageInputs(image, "plank")
    with pytest.raises(ValueError, match=f"^image 1 of the list .*{message}") as caught:
        ImageInputs([NOISE, image], "plank")
    assert "\n" not in str(caught.value)


def test_a_list_in_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image 0 of the list is list, .*: give one flat list"):
        ImageInputs([[NOISE]], "plank")


def values_of(inputs: ImageInputs, side: int = 8, resize: Resize | None = None) -> torch.Tensor:
    preprocessing = Preprocessing(resize=resize or Resize())
    dataset = inputs.dataset(side, preprocessing, None)
    return dataset.collate([dataset[index] for index in range(len(dataset))])["image"]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_pil_images_are_read_as_their_files(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    with Image.open(file) as opened:
        assert np.array_equal(ImageSource(opened).read(), read_image(file))


def test_pil_images_are_turned_by_their_exif_data(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "a.jpg"
    Image.fromarray(NOISE).save(file, exif=exif)
    with Image.open(file) as opened:
        pixels = ImageSource(opened).read()
        assert opened.size == (30, 20), "the caller's image is not changed"
    assert pixels.shape == (30, 20, 3)
    assert np.array_equal(pixels, read_image(file))


def test_a_damaged_pil_image_cannot_be_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG")
    truncated = Image.open(io.BytesIO(buffer.getvalue()[:900]))
    with pytest.raises(ValueError, match="the PIL image cannot be decoded"):
        ImageSource(truncated).read()


def test_arrays_are_copied_as_cameras_reuse_them() -> None:
    frame = NOISE.copy()
    inputs = ImageInputs([frame, frame[..., 0]], "plank")
    frame[:] = 0
    assert np.array_equal(inputs.sources[0].read(), NOISE)
    grey = inputs.sources[1].read()
    assert all(np.array_equal(grey[..., channel], NOISE[..., 0]) for channel in range(3))


def test_images_become_tensors_of_one_size(tmp_path: Path) -> None:
    file = save_picture(tmp_path / "a.png", NOISE)
    inputs = ImageInputs((image for image in (str(file), NOISE, Image.fromarray(NOISE))), "plank")
    assert not inputs.is_single
    values = values_of(inputs)
    assert values.shape == (3, 3, 8, 8)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert [inputs.size(index) for index in range(3)] == [(20, 30)] * 3
    cropped = values_of(ImageInputs(NOISE, "plank"), 8, Resize("shorter_crop", 10))
    assert not torch.equal(cropped[0], values[0])


def test_paths_patterns_and_folders(tmp_path: Path) -> None:
    photos = tmp_path / "photos [1]"
    for name in ("b.png", "a.png", "c/c.png"):
        save_picture(photos / name, NOISE)
    (photos / "notes.txt").write_text("no image")
    single = ImageInputs(photos / "a.png", "plank")
    assert single.is_single
    assert [s.path for s in single.sources] == [photos / "a.png"]
    folder = ImageInputs(str(photos), "plank")
    assert [s.image.name for s in folder.samples] == ["a.png", "b.png", "c.png"]
    (tmp_path / "flat").mkdir()
    for name in ("2.png", "1.png"):
        save_picture(tmp_path / "flat" / name, NOISE)
    pattern = ImageInputs(str(tmp_path / "flat" / "*.png"), "plank")
    assert [s.image.name for s in pattern.samples] == ["1.png", "2.png"]
    assert not pattern.is_single
    with pytest.raises(FileNotFoundError, match="as a pattern it matches nothing"):
        ImageInputs(str(tmp_path / "flat" / "*.jpg"), "plank")
    with pytest.raises(FileNotFoundError, match=r"c.png: there is no such file"):
        ImageInputs(tmp_path / "c.png", "plank")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no image in this folder"):
        ImageInputs(tmp_path / "empty", "plank")


def test_images_of_a_folder_that_are_not_used_are_counted(tmp_path: Path) -> None:
    for name in ("good/a.png", "b.png"):
        save_picture(tmp_path / name, NOISE)
    (tmp_path / "notes.txt").write_text("no image")
    inputs = ImageInputs(tmp_path, "plank")
    assert [s.image.name for s in inputs.samples] == ["a.png"]
    assert inputs.remarks == [f"{tmp_path}: not used: images next to the folders (1)"]


def test_home_folders_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_picture(tmp_path / "a.png", NOISE)
    assert ImageInputs("~/a.png", "plank").sources[0].path == tmp_path / "a.png"


def test_the_bit_depth_is_that_of_the_given_files(tmp_path: Path) -> None:
    shallow = save_picture(tmp_path / "8.png", NOISE)
    deep = tmp_path / "16.png"
    Image.fromarray(np.full((4, 4), 900, np.uint16)).save(deep)
    assert ImageInputs([shallow, NOISE], "plank").depth(None) == (None, None)
    assert ImageInputs([shallow, deep], "plank").depth(12) == (12, None)
    assert ImageInputs([shallow], "plank").depth(12) == (None, None)
    bits, remark = ImageInputs([shallow, deep], "plank").depth(None)
    assert bits == 10
    assert remark == (
        "1 image with 16 bits per channel: 10 are used (chosen by the highest value, 900 in 16.png)"
    )
    assert ImageInputs([NOISE, deep], "plank").has_files
    assert not ImageInputs([NOISE], "plank").has_files
