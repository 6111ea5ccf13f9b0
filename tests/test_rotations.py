from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_clip.methods.rotations import (
    RegularRotations,
    has_rotations,
    in_batches,
    random_rotations,
    regular_rotations,
)


def image(height: int = 24, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_regular_copies_are_rotated_by_multiples_of_45_degrees() -> None:
    square = image()
    copies = regular_rotations(square)
    assert copies.shape == (8, 3, 24, 24)
    assert torch.equal(copies[0], square)
    # A quarter turn about (W / 2, H / 2) moves pixel (i, j) to (H - j, i): first rows are filled.
    turned = torch.rot90(square, 1, (1, 2))
    assert torch.equal(copies[2][:, 1:, :], turned[:, :-1, :])
    assert torch.equal(copies[4][:, 1:, 1:], torch.rot90(square, 2, (1, 2))[:, :-1, :-1])


@pytest.mark.parametrize("size", [(24, 24), (17, 30), (1, 1), (1, 9)])
def test_regular_copies_are_those_of_opencv(size: tuple[int, int]) -> None:
    pixels = image(*size).permute(1, 2, 0).numpy()
    height, width = size
    for copy, angle in zip(regular_rotations(image(*size)), range(0, 360, 45), strict=True):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
        expected = cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT101)
        assert np.array_equal(copy.permute(1, 2, 0).numpy(), expected)


def test_random_copies_are_rotated_by_the_angles_of_seed_and_index() -> None:
    copies = random_rotations(image(), 3, seed=4, index=7)
    angles = np.random.default_rng([4, 7]).uniform(0, 345, 3)
    original = Image.fromarray(image().permute(1, 2, 0).numpy())
    for copy, angle in zip(copies, angles, strict=True):
        expected = np.asarray(original.rotate(angle, Image.Resampling.NEAREST, fillcolor=0))
        assert np.array_equal(copy.permute(1, 2, 0).numpy(), expected)
    assert copies[:, :, 0, 0].any() or copies[:, :, -1, -1].any() or (copies == 0).any()
    for other in (
        random_rotations(image(), 3, seed=5, index=7),
        random_rotations(image(), 3, seed=4, index=8),
    ):
        assert not torch.equal(copies, other)
    assert torch.equal(copies[:2], random_rotations(image(), 2, seed=4, index=7))


def test_copies_of_several_images_share_batches() -> None:
    copies = [torch.full((3, 1, 2, 2), float(number)) for number in range(5)]
    for size, sizes in ((4, [4, 4, 4, 3]), (1, [1] * 15), (7, [7, 7, 1]), (15, [15]), (99, [15])):
        batches = list(in_batches(copies, size))
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(torch.cat(batches), torch.cat(copies))
    assert list(in_batches([], 4)) == []


@pytest.mark.parametrize(
    ("rotations", "dataset", "category", "expected"),
    [
        ("auto", "MVTecAD", "screw", True),
        ("auto", "MVTecAD", "transistor", True),  # AnomalyDINO's list; SubspaceAD's differs
        ("auto", "MVTecAD", "carpet", False),
        ("auto", "VisA", "pcb1", True),
        ("auto", "Demo", "screw", False),
        ("auto", None, "screw", False),
        ("informed", "MVTecAD", "screw", True),
        ("informed", "MVTecAD", "hazelnut", True),
        ("informed", "MVTecAD", "bottle", False),
        ("informed", "VisA", "pcb1", False),
        ("informed", None, "screw", False),
        ("on", None, "carpet", True),
        ("off", "MVTecAD", "screw", False),
    ],
)
def test_categories_with_rotated_copies(
    rotations: RegularRotations, dataset: str | None, category: str, expected: bool
) -> None:
    assert has_rotations(rotations, dataset, category) is expected
