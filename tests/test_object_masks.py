from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from anomaly_clip.methods.object_masks import (
    MaskShape,
    Switch,
    check_masks,
    grid_object_mask,
    has_masks,
    object_masks,
    tell_of_threshold,
)


def tokens_of(inside: Tensor, seed: int = 0, size: float = 8.0) -> Tensor:
    """Return tokens ``(N, 6)`` that differ from noise along one direction within an object."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    noise = 0.1 * torch.randn(inside.numel(), 6, generator=generator)
    return size * inside.flatten()[:, None].float() * direction + noise


def square_object() -> Tensor:
    inside = torch.zeros(14, 14, dtype=torch.bool)
    inside[4:10, 4:10] = True
    return inside


def official(tokens: Tensor, grid: tuple[int, int], threshold: float, shape: MaskShape) -> Any:
    """Return the mask of the paper, transcribed with scikit-learn and OpenCV."""
    values = PCA(n_components=1, svd_solver="full").fit_transform(tokens.double().numpy())[:, 0]
    mask = values > threshold
    rows, columns = grid
    centre = mask.reshape(grid)[int(rows * 0.2) : int(rows * 0.8)]
    centre = centre[:, int(columns * 0.2) : int(columns * 0.8)]
    if centre.sum() <= centre.size * 0.35:
        mask = -values > threshold
    arranged = mask.reshape(grid if shape == "grid" else (-1, 1)).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    arranged = cv2.dilate(arranged, kernel)
    return cv2.morphologyEx(arranged, cv2.MORPH_CLOSE, kernel).astype(bool).ravel()


@pytest.mark.parametrize("shape", ["column", "grid"])
@pytest.mark.parametrize("seed", range(5))
def test_masks_are_those_of_scikit_learn_and_opencv(shape: MaskShape, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = 9 + seed, 12
    inside = torch.rand(grid, generator=generator) > 0.55
    tokens = tokens_of(inside, seed)
    mask = grid_object_mask(tokens, grid, 5.0, shape)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), official(tokens, grid, 5.0, shape))


def test_an_object_is_found_with_either_sign() -> None:
    inside = square_object()
    grown = torch.zeros(14, 14, dtype=torch.bool)
    grown[3:11, 3:11] = True  # dilated by one patch
    for sign in (1, -1):
        mask = grid_object_mask(sign * tokens_of(inside), (14, 14), 10.0, "grid")
        assert torch.equal(mask.view(14, 14), grown)


def test_a_column_is_dilated_along_the_rows_of_the_image_only() -> None:
    """A patch marks its left and right neighbours, but not those above and below."""
    inside = square_object()
    mask = grid_object_mask(tokens_of(inside), (14, 14), 5.0, "column").view(14, 14)
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[4:10, 3:11] = True
    assert torch.equal(mask, expected)


def test_masks_of_a_batch_are_those_of_its_images() -> None:
    tokens = torch.stack([tokens_of(square_object(), seed) for seed in range(3)])
    masks = object_masks(tokens, 5.0, "grid")
    for patches, mask in zip(tokens, masks, strict=True):
        assert torch.equal(mask, grid_object_mask(patches, (14, 14), 5.0, "grid"))


def test_equal_patches_are_no_object_and_unusable_ones_are_kept() -> None:
    constant = torch.full((2, 16, 4), 3.0)
    assert not object_masks(constant, 10.0, "column").any()
    constant[0, 3, 2], constant[1, 0, 0] = torch.nan, torch.inf
    assert object_masks(constant, 10.0, "column").all()
    assert not object_masks(torch.zeros(1, 1, 4), 10.0, "grid").any()  # a single patch


@pytest.mark.parametrize(
    ("masks", "dataset", "category", "expected"),
    [
        ("auto", "MVTecAD", "pill", True),
        ("auto", "MVTecAD", "bottle", False),
        ("auto", "VisA", "candle", True),
        ("auto", "Demo", "pill", False),
        ("auto", None, "pill", False),
        ("on", None, "bottle", True),
        ("off", "VisA", "candle", False),
    ],
)
def test_categories_with_masks(
    masks: Switch, dataset: str | None, category: str, expected: bool
) -> None:
    assert has_masks(masks, dataset, category) is expected


def test_the_threshold_belongs_to_one_network(capsys: pytest.CaptureFixture[str]) -> None:
    def backbone(name: str) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(name=name))

    for name in ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.lvd142m"):
        tell_of_threshold("M", "on", 10.0, backbone(name))
    tell_of_threshold("M", "on", 2.5, backbone("resnet18"))  # set by the user
    assert capsys.readouterr().err == ""
    for name in ("resnet18", "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2.lvd142m"):
        tell_of_threshold("M", "on", 10.0, backbone(name))
        err = " ".join(capsys.readouterr().err.split())
        assert f"with {name}, masks may be wrong" in err
    tell_of_threshold("M", "off", 10.0, backbone("resnet18"))
    assert capsys.readouterr().err == ""
    tell_of_threshold("M", "auto", 10.0, backbone("resnet18"))
    assert "with resnet18, objects are not masked" in " ".join(capsys.readouterr().err.split())


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.masks must be one of auto, on, off, got yes"):
        check_masks("yes", "grid")
    with pytest.raises(ValueError, match=r"model\.mask_shape must be one of column, grid"):
        check_masks("on", "row")
