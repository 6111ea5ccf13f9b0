"""Preprocessing of images before they are scored, from checkpoints and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import save_picture

from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.data.transforms import Resize
from anomaly_clip.errors import UserError
from anomaly_clip.preprocessing import Preprocessing

RECORD: dict[str, Any] = {
    "data": "MVTecAD",
    "image_size": 224,
    "resize": {"rule": "shorter_crop", "size": 256, "filter": "lanczos"},
    "max_pixels": 1000,
    "words": {"metal_nut": "metal nut"},
    "is_named": True,
    "precision": "bf16-mixed",
}
EXPECTED = Preprocessing(
    Resize("shorter_crop", 256, "lanczos"),
    12,
    1000,
    "bf16-mixed",
    "MVTecAD",
    {"metal_nut": "metal nut"},
    True,
)


def test_a_checkpoint_tells(tmp_path: Path) -> None:
    checkpoint = {"preprocessing": RECORD, "bit_depth": 12}
    assert Preprocessing.of_checkpoint(checkpoint, tmp_path / "a.ckpt") == EXPECTED


@pytest.mark.parametrize(
    "changed",
    [
        {"resize": {"rule": "square", "other": 3}},
        {"resize": None},
        {"max_pixels": "many"},
        {"words": ["plank"]},
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"a.ckpt: its preprocessing is damaged"):
        Preprocessing.of_checkpoint({"preprocessing": {**RECORD, **changed}}, tmp_path / "a.ckpt")
    short = {key: value for key, value in RECORD.items() if key != next(iter(changed))}
    with pytest.raises(UserError, match="its preprocessing is damaged"):
        Preprocessing.of_checkpoint({"preprocessing": short}, tmp_path / "a.ckpt")


def config(tmp_path: Path, class_path: str, **options: Any) -> Path:
    """Write the configuration of a fit of version 0.1.0, and return its checkpoint."""
    resize = {"rule": "shorter_crop", "size": 256, "filter": "lanczos"}
    data = {"class_path": class_path, "init_args": {"resize": resize, **options}}
    content = {"data": data, "trainer": {"precision": None}}
    (tmp_path / "config-fit.yaml").write_text(yaml.safe_dump(content))
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    file.touch()
    return file


def test_the_configuration_of_an_earlier_fit_tells(tmp_path: Path) -> None:
    file = config(tmp_path, "anomaly_clip.data.MVTecAD", categories=["metal_nut"], words=None)
    read = Preprocessing.of_checkpoint({"bit_depth": None}, file)
    assert read.resize == Resize("shorter_crop", 256, "lanczos")
    assert (read.data, read.precision, read.is_named) == ("MVTecAD", "32-true", True)
    data = MVTecAD(str(tmp_path), words=None)
    assert read.words == {"metal_nut": data.info.words.get("metal_nut", "metal_nut")}


@pytest.mark.parametrize(
    ("options", "words", "is_named"),
    [
        ({"category": "bolt", "words": {"bolt": "steel bolt"}}, {"bolt": "steel bolt"}, True),
        ({"category": None}, {"parts": "parts"}, False),
    ],
)
def test_the_configuration_of_an_own_folder_tells(
    tmp_path: Path, options: dict[str, Any], words: dict[str, str], is_named: bool
) -> None:
    file = config(tmp_path, "anomaly_clip.data.ImageFolder", **options)
    checkpoint = {"fitted_category": "parts"}
    read = Preprocessing.of_checkpoint(checkpoint, file)
    assert (read.words, read.is_named, read.data) == (words, is_named, "ImageFolder")


def test_a_foreign_data_set_is_not_imported(tmp_path: Path) -> None:
    file = config(tmp_path, "evil.Data", categories=["a"])
    assert Preprocessing.of_checkpoint({}, file).data is None


def test_without_either_the_way_out_is_told(tmp_path: Path) -> None:
    file = config(tmp_path, "anomaly_clip.data.MVTecAD")
    (tmp_path / "config-fit.yaml").write_text("data: {class_path: MVTecAD}\n")
    with pytest.raises(UserError, match="not the configuration of a fit, or a damaged one"):
        Preprocessing.of_checkpoint({}, file)
    (tmp_path / "config-fit.yaml").unlink()
    with pytest.raises(UserError, match=r"put the config-fit.yaml of the fit next to it"):
        Preprocessing.of_checkpoint({}, file)


def test_a_data_module_tells(tmp_path: Path) -> None:
    save_picture(tmp_path / "plank" / "good" / "0.png")
    data = ImageFolder(str(tmp_path / "plank"), bit_depth=12, resize=Resize(filter="nearest"))
    read = Preprocessing.of_data(data, "16-mixed")
    assert (read.bit_depth, read.resize.filter, read.precision) == (12, "nearest", "16-mixed")
    assert (read.words, read.is_named) == ({"plank": "plank"}, False)
    assert Preprocessing.of_data(ImageFolder(str(tmp_path), "bolt"), "32-true").bit_depth is None
