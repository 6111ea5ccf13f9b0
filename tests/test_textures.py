from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import save_picture
from numpy.typing import NDArray

from anomaly_clip.synthesis import textures
from anomaly_clip.synthesis.perlin import Perlin


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def test_textures_come_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "textures" / "woven"
    save_picture(folder / "a.png", np.full((30, 40, 3), 7, np.uint8))
    image = np.full((64, 64, 3), 99, np.uint8)
    make = Perlin(0.2, "folder", str(tmp_path / "textures"), num_changes=0, least_opacity=1.0)
    num_defects = 0
    for seed in range(5):
        result = make(image, np.random.default_rng(seed))
        assert (result.image[result.mask] == 7).all()
        num_defects += int(result.mask.any())
    assert num_defects
    textures._textures.cache_clear()
    nowhere = Perlin(0.2, "folder", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="contains no texture images"):
        nowhere(image, np.random.default_rng(0))


@pytest.mark.parametrize("change", textures.CHANGES, ids=lambda change: change.__name__)
def test_augmentations(change: Any) -> None:
    image = noise_image(np.random.default_rng(0), 40, 50, 1)
    kept = image.copy()
    results = [change(image, np.random.default_rng(seed)) for seed in range(6)]
    assert all((result.dtype, result.shape) == (np.uint8, image.shape) for result in results)
    assert any(not np.array_equal(result, image) for result in results)
    assert np.array_equal(image, kept)
    assert change(np.full((20, 20, 3), 77, np.uint8), np.random.default_rng(0)).shape == (20, 20, 3)
