from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from regad_runs import one_thread, pixel_cnn
from safetensors.torch import load_file
from scipy.ndimage import affine_transform
from torch.testing import assert_close

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.methods.regad_network import (
    RegistrationNetwork,
    augment,
    negative_cosine,
    warp,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def backbone() -> CNNBackbone:
    return pixel_cnn()


@pytest.mark.golden
def test_golden_augmentation(golden: Callable[[str], Any]) -> None:
    arrays = load_file(golden("detectors").folder / "regad.safetensors")
    expected = arrays["augmented"]
    atol = 1e-5 * float(expected.abs().max())
    assert_close(augment(arrays["aug_source"]), expected, atol=atol, rtol=0)


def test_the_order_of_the_augmentations() -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    augmented = augment(images).unflatten(0, (22, 2))
    assert_close(augmented[0], images)
    assert_close(augmented[17], torch.flip(images, dims=[3]))
    grey = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    assert_close(augmented[18], torch.stack([grey] * 3, dim=1))
    for quarters in (1, 2, 3):
        rotated = np.rot90(images.numpy(), quarters, axes=(2, 3)).copy()
        assert_close(augmented[18 + quarters], torch.from_numpy(rotated))


def test_rotations_and_translations_match_scipy() -> None:
    torch.manual_seed(1)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    augmented = augment(image)
    middle = np.array([7.5, 7.5])
    angles = {1: -4, 4: -1, 5: 1, 8: 4}
    for place, steps in angles.items():
        cos, sin = np.cos(steps * np.pi / 16), np.sin(steps * np.pi / 16)
        matrix = np.array([[cos, sin], [-sin, cos]])  # acts on (row, column), not (x, y)
        for channel in range(3):
            expected = affine_transform(
                image[0, channel].numpy(), matrix, middle - matrix @ middle, order=1, mode="reflect"
            )
            np.testing.assert_allclose(augmented[place, channel], expected, atol=1e-9)
    # A shift by 0.2 of half an image's side samples 1.6 pixels further right and down.
    for place, (right, down) in {9: (1.6, 1.6), 10: (-1.6, 1.6), 16: (0.8, -0.8)}.items():
        expected = affine_transform(
            image[0, 0].numpy(), np.eye(2), np.array([down, right]), order=1, mode="reflect"
        )
        np.testing.assert_allclose(augmented[place, 0], expected, atol=1e-6)


def test_a_warp_is_undone_by_its_inverse() -> None:
    torch.manual_seed(0)
    matrix = torch.eye(2, dtype=torch.float64) + 0.2 * torch.randn(3, 2, 2, dtype=torch.float64)
    # A smooth bump, away from the border.
    ramp = torch.linspace(-1, 1, 64, dtype=torch.float64)
    bump = torch.exp(-8 * (ramp[:, None] ** 2 + (ramp[None] - 0.1) ** 2)).expand(3, 1, 64, 64)
    again = warp(warp(bump, matrix), torch.linalg.inv(matrix))
    assert float((again - bump)[..., 16:48, 16:48].abs().max()) < 0.02


def test_the_loss_by_hand() -> None:
    guess = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).requires_grad_()
    target = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    loss = negative_cosine(guess, target)
    assert loss.item() == pytest.approx(-0.6)
    loss.sum().backward()
    assert guess.grad is not None
    assert target.grad is None


def test_initial_stages_are_those_of_the_backbone(backbone: CNNBackbone) -> None:
    network = RegistrationNetwork(backbone, 64).eval()
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        stages, frozen = network.stages(pixels), backbone(pixels)
        last = network(pixels)
    for stage, layer in zip(stages, ("layer1", "layer2", "layer3"), strict=True):
        assert_close(stage, frozen[layer], atol=1e-3, rtol=1e-3)
    assert_close(last, frozen["layer3"], atol=1e-3, rtol=1e-3)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
