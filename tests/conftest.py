"""Fixtures: reference arrays, a tiny CLIP with random weights, and folders of tiny pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test uses a network
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of tests share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.files import CACHE_VARIABLE

settings.register_profile("untimed", deadline=None)  # no test is judged by its time
settings.load_profile("untimed")

TESTS = Path(__file__).parent
SHARED = TESTS.parent.parent / "shared"
"""Real images, beside the project where there are any."""

TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Golden:
    """Reference arrays of one official implementation."""

    folder: Path

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the expected tensors below a prefix, by the rest of their names."""
        found = {k[len(prefix) :]: v for k, v in self.expected.items() if k.startswith(prefix)}
        assert found, f"no golden tensor is named {prefix}..."
        return found


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Return a function from a folder's name to its arrays; skips where the folder is missing."""
    chosen = os.environ.get("ANOMALY_CLIP_GOLDEN")
    root = Path(chosen or TESTS / "golden")
    if chosen and not root.is_dir():
        pytest.fail(f"ANOMALY_CLIP_GOLDEN {root}: there is no such folder")

    def load(name: str) -> Golden:
        if not (root / name).is_dir():
            pytest.skip(f"no golden folder {name} (ANOMALY_CLIP_GOLDEN)")
        return Golden(root / name)

    return load


@pytest.fixture(scope="session")
def golden_clip(golden: Callable[[str], Golden]) -> CLIPBackbone:
    """Return the CLIP that the golden arrays of CLIP-AD and WinCLIP come from."""
    folder = golden("clip_ad").folder
    return CLIPBackbone(str(folder / "model_config.json"), str(folder / "state_dict.safetensors"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function from a name to a folder of real images; skips where it is missing."""

    def find(name: str) -> Path:
        if not (SHARED / "data" / name).is_dir():
            pytest.skip(f"needs the real images {name} in ../shared/data")
        return SHARED / "data" / name

    return find


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_clip_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a model configuration that builds in no time."""
    path = tmp_path_factory.mktemp("model") / "tiny_clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    return str(path)


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_config: str) -> CLIPBackbone:
    torch.manual_seed(0)
    return CLIPBackbone(tiny_clip_config, "random")


def save_picture(path: Path, array: np.ndarray | None = None, *, size: int = 40) -> Path:
    """Save an array, or a grey ramp, as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        ramp = np.linspace(0, 255, size, dtype=np.uint8)
        array = np.repeat(np.tile(ramp, (size, 1))[..., None], 3, axis=2)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def golden_category(golden: Callable[[str], Golden], tmp_path: Path) -> Path:
    """Write the golden pictures as a category of MVTec-AD; returns the root."""
    arrays = golden("clip_ad")
    category = tmp_path / "mvtec" / arrays.meta["e2e_object"]
    labels = arrays.inputs["e2e.labels"].bool().tolist()
    for number, (image, mask, anomalous) in enumerate(
        zip(arrays.inputs["e2e.images"], arrays.inputs["e2e.masks"], labels, strict=True)
    ):
        # One folder of defects a picture, so that the sorted listing keeps the order.
        defect = f"{number:03d}" if anomalous else "good"
        save_picture(category / "test" / defect / f"{number:03d}.png", image.numpy())
        if anomalous:
            path = category / "ground_truth" / defect / f"{number:03d}_mask.png"
            save_picture(path, mask.numpy().astype(np.uint8))
    return category.parent


@pytest.fixture
def mvtec_root(tmp_path: Path) -> Path:
    """Return a data set in MVTec-AD's layout: two categories, 2 normal and 2 anomalous each."""
    rng = np.random.default_rng(0)
    root = tmp_path / "mvtec"
    for category in ("bottle", "metal_nut"):
        for name in ("train/good/000", "train/good/001", "test/good/000", "test/good/001"):
            save_picture(root / category / f"{name}.png", _noise(rng))
        for number in ("000", "001"):
            save_picture(root / category / "test" / "scratch" / f"{number}.png", _noise(rng))
            mask = np.zeros((40, 48), dtype=np.uint8)
            mask[8:20, 10:30] = 255
            save_picture(root / category / "ground_truth" / "scratch" / f"{number}_mask.png", mask)
    return root


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
