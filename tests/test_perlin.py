from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from anomaly_clip.synthesis.perlin import Perlin, perlin_noise


def noise_image(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> NDArray[np.uint8]:
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), sigma).astype(np.uint8) if sigma else noise


def plain_perlin(size: int, cells: tuple[int, int], angles: NDArray[np.float64]) -> NDArray[Any]:
    """Return the noise pixel by pixel, from its definition."""
    result = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * cells[0] / size, column * cells[1] / size
            i, j = int(y), int(x)
            total = 0.0
            for a in (0, 1):
                for b in (0, 1):
                    dy, dx = y - i - a, x - j - b
                    weight = 1.0
                    for t in (abs(dy), abs(dx)):
                        weight *= 1 - (6 * t**5 - 15 * t**4 + 10 * t**3)
                    angle = angles[i + a, j + b]
                    total += weight * (np.cos(angle) * dy + np.sin(angle) * dx)
            result[row, column] = np.sqrt(2) * total
    return result


@pytest.mark.parametrize("cells", [(1, 1), (2, 8), (32, 4)])
def test_noise_follows_its_definition(cells: tuple[int, int]) -> None:
    angles = np.random.default_rng(3).uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    ours = perlin_noise((32, 32), cells, np.random.default_rng(3))
    np.testing.assert_allclose(ours, plain_perlin(32, cells, angles), atol=1e-6)
    assert perlin_noise((250, 392), cells, np.random.default_rng(0)).shape == (250, 392)


@pytest.mark.parametrize(
    ("size", "empty", "area", "quantiles"),
    [(256, 0.055, 0.052, (0.027, 0.047, 0.074)), (224, 0.04, 0.049, (0.029, 0.046, 0.07))],
)
def test_perlin_masks_have_the_measured_statistics(
    size: int, empty: float, area: float, quantiles: tuple[float, ...]
) -> None:
    """Ours are within 25 % of those measured on 600 masks of DRAEM's recipe (arXiv 2108.07610)."""
    image, make = np.full((size, size, 3), 99, np.uint8), Perlin(source="self", num_changes=0)
    shares = np.array(
        [make(image, np.random.default_rng([1, number])).mask.mean() for number in range(600)]
    )
    areas = shares[shares > 0]
    spread = np.sqrt(2 * empty * (1 - empty) / 600)  # both fractions are counts out of 600
    assert 1 - len(areas) / 600 == pytest.approx(empty, abs=max(0.25 * empty, 4 * spread))
    assert areas.mean() == pytest.approx(area, rel=0.25)
    for quantile, expected in zip(np.quantile(areas, (0.1, 0.5, 0.9)), quantiles, strict=True):
        assert quantile == pytest.approx(expected, rel=0.25)
