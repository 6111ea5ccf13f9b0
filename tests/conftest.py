"""Fixtures: reference arrays, a tiny CLIP with random weights, and folders of tiny images."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it on import; tests use no network
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import open_clip
import pytest
import torch
from helpers import TINY_CLIP, Golden, save_picture, write_mvtec
from hypothesis import settings
from PIL import Image
from standing_clock import StandingClock

from anomaly_clip import progress
from anomaly_clip.backbones import cnn
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.files import CACHE_VARIABLE

settings.register_profile("untimed", deadline=None)  # no time limit per example
settings.load_profile("untimed")

TESTS = Path(__file__).parent
REAL_IMAGES = Path(
    os.environ.get("ANOMALY_CLIP_REAL_IMAGES") or TESTS.parent.parent / "shared" / "data"
)
"""Folder of real images next to the repository; it may be missing."""


@pytest.fixture(autouse=True, scope="session")
def _python_handles_ctrl_c() -> None:
    """Let Ctrl-C interrupt as usual: a shell may have started the tests with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Return a function that loads a golden folder by name, or skips the test without it."""
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
    """Return the CLIP that produced the golden arrays of CLIP-AD and WinCLIP."""
    folder = golden("clip_ad").folder
    return CLIPBackbone(str(folder / "model_config.json"), str(folder / "state_dict.safetensors"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds real images by name, or skips the test without them."""

    def find(name: str) -> Path:
        if not (REAL_IMAGES / name).is_dir():
            pytest.skip(f"needs the real images {name} in $ANOMALY_CLIP_REAL_IMAGES")
        return REAL_IMAGES / name

    return find


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _share_slow_objects() -> Iterator[None]:
    """Speed up hundreds of tests without changing their results.

    Untrained CNNs depend only on their name and the seed: each is built once, and every test gets
    a copy. The tokenizer, which reads the whole vocabulary, is built once as well. WebP images are
    compressed with the fastest method, which only makes the files larger.
    """
    built = lru_cache(maxsize=4)(lambda name, seed, build=cnn._build: build(name))
    Image.init()
    save = Image.SAVE["WEBP"]

    def save_quickly(image: Any, *where: Any) -> None:
        image.encoderinfo.setdefault("method", 0)
        save(image, *where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cnn, "_build", lambda name: deepcopy(built(name, torch.initial_seed())))
        patch.setattr(open_clip, "SimpleTokenizer", lru_cache(open_clip.SimpleTokenizer))
        patch.setitem(Image.SAVE, "WEBP", save_quickly)
        yield


@pytest.fixture(scope="session")
def tiny_clip_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of the configuration of a CLIP that is fast to build."""
    path = tmp_path_factory.mktemp("model") / "tiny_clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    return str(path)


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_config: str) -> CLIPBackbone:
    torch.manual_seed(0)
    return CLIPBackbone(tiny_clip_config, "random")


@pytest.fixture
def golden_category(golden: Callable[[str], Golden], tmp_path: Path) -> Path:
    """Write the golden images as a category of MVTec-AD; return the root."""
    arrays = golden("clip_ad")
    category = tmp_path / "mvtec" / arrays.meta["e2e_object"]
    labels = arrays.inputs["e2e.labels"].bool().tolist()
    for number, (image, mask, anomalous) in enumerate(
        zip(arrays.inputs["e2e.images"], arrays.inputs["e2e.masks"], labels, strict=True)
    ):
        # One defect folder per image, so that the sorted listing keeps the order.
        defect = f"{number:03d}" if anomalous else "good"
        save_picture(category / "test" / defect / f"{number:03d}.png", image.numpy())
        if anomalous:
            path = category / "ground_truth" / defect / f"{number:03d}_mask.png"
            save_picture(path, mask.numpy().astype(np.uint8))
    return category.parent


@pytest.fixture
def mvtec_root(tmp_path: Path) -> Path:
    """Write a data set in MVTec-AD's layout; see ``write_mvtec``."""
    return write_mvtec(tmp_path)


@pytest.fixture
def tiny_sdp(tiny_clip_config: str, mvtec_root: Path, tmp_path: Path) -> list[str]:
    """Return the options of SDP with the tiny CLIP on the tiny data set; runs go to ``runs``."""
    return [
        f"--config={TESTS.parent / 'configs' / 'sdp.yaml'}",
        f"--model.backbone.name={tiny_clip_config}",
        "--model.backbone.pretrained=random",
        "--model.stages=null",
        '--model.prompts.templates=["the {}."]',
        "--model.rvs.method=mean",
        f"--data.root={mvtec_root}",
        "--data.num_workers=0",
        f"--output.root={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rich treat standard error as a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a progress line for every item."""
    for name in ("FIRST_LINE", "LINE_INTERVAL", "LINE_SHARE"):
        monkeypatch.setattr(progress, name, 0.0)
