"""Masks of the detectors' configurations, against their public code transcribed literally."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import save_picture
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.data.transforms import Resize

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = [(97, 97), (120, 80), (400, 301), (31, 64), (700, 233)]  # width and height
Rule = Callable[[Path], NDArray[np.bool_]]


def rd4ad(mask: Path) -> NDArray[np.bool_]:
    """Resize to 256 x 256 with PIL's bilinear filter; a defect is above one half."""
    resized = transforms.Compose(
        [transforms.Resize((256, 256)), transforms.CenterCrop(256), transforms.ToTensor()]
    )(Image.open(mask))
    resized[resized > 0.5] = 1
    resized[resized <= 0.5] = 0
    return resized[0].numpy() == 1


def simplenet(mask: Path) -> NDArray[np.bool_]:
    """Resize the shorter side to 329, crop 288; a defect is what is still 1 as an integer."""
    resized = transforms.Compose(
        [transforms.Resize(329), transforms.CenterCrop(288), transforms.ToTensor()]
    )(Image.open(mask))
    return resized[0].numpy().astype(int) == 1


def nearest(mask: Path) -> NDArray[np.bool_]:
    """Resize the shorter side to 256, crop 224, by the nearest pixel."""
    kind = transforms.InterpolationMode.NEAREST
    resized = transforms.Compose(
        [transforms.Resize(256, kind), transforms.CenterCrop(224), transforms.ToTensor()]
    )(Image.open(mask))
    return resized[0].numpy() > 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return defects with slanted edges, of a few pixels and of most of the image."""
    folder, rng = tmp_path_factory.mktemp("mvtec") / "nut", np.random.default_rng(0)
    save_picture(folder / "train" / "good" / "0.png")
    for number, (width, height) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        save_picture(folder / "test" / "cut" / f"{number}.png", image)
        rows, columns = np.mgrid[:height, :width]
        mask = (rows * 0.7 + columns > 0.5 * width) & (rows > 0.2 * height)
        mask |= rng.random((height, width)) > 0.999
        grey = np.where(mask, 255, 0).astype(np.uint8)
        save_picture(folder / "ground_truth" / "cut" / f"{number}_mask.png", grey)
    return folder.parent


def settings(name: str) -> tuple[int, dict[str, Any]]:
    """Return the image size of a configuration, and how it makes images and masks square."""
    content = yaml.safe_load((CONFIGS / name).read_text())
    data = content["data"]["init_args"]
    chosen = {key: value for key, value in data.items() if key.startswith("mask_")}
    return content["model"]["init_args"]["image_size"], {
        **chosen,
        "resize": Resize(**data["resize"]),
    }


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("rd4ad.yaml", rd4ad),
        ("simplenet.yaml", simplenet),
        ("padim.yaml", nearest),
        ("patchcore.yaml", nearest),
    ],
)
def test_masks_equal_those_of_the_public_code(root: Path, name: str, rule: Rule) -> None:
    size, options = settings(name)
    data = MVTecAD(str(root), image_size=size, **options)
    dataset = data.dataset("test")
    plain = MVTecAD(str(root), image_size=size, mask_filter="nearest", resize=options["resize"])
    different = 0
    for row, sample in enumerate(data.samples("test")):
        assert sample.mask is not None
        ours = dataset[row]["mask"]
        assert torch.equal(ours, torch.from_numpy(rule(sample.mask)))
        different += int((ours != plain.dataset("test")[row]["mask"]).sum())
    assert (different > 0) == (name in ("rd4ad.yaml", "simplenet.yaml"))


@pytest.mark.parametrize("data", ["visa", "btad", "ksdd2", "mvtec_ad_2", "meta_json"])
@pytest.mark.parametrize(("name", "threshold"), [("rd4ad", 0.5), ("simplenet", 0.998)])
def test_another_data_set_keeps_the_rule(name: str, threshold: float, data: str) -> None:
    files = [f"--config={CONFIGS / f'{name}.yaml'}", f"--config={CONFIGS / 'data' / data}.yaml"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["fit", *files, "--print_config"])
    options = yaml.safe_load(printed.getvalue())["data"]["init_args"]
    assert (options["mask_filter"], options["mask_threshold"]) == ("bilinear", threshold)
