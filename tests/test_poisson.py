from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.sparse.linalg import spsolve
from synthesis_images import noise_image, shapes

from anomaly_clip.synthesis.poisson import blend, blend_opencv, bounding_box, solve


def test_blending_is_within_a_grey_level_of_opencv() -> None:
    """200 cases: normal and mixed gradients with full, elliptic and ragged masks.

    Full masks reach the border.
    """
    means = []
    for number in range(100):
        rng = np.random.default_rng(number)
        height, width = (int(side) for side in rng.integers(8, 120, 2))
        background = noise_image(rng, height, width, float(rng.choice([0, 1, 3])))
        patch = noise_image(rng, height, width, float(rng.choice([0, 1, 3])))
        mask = shapes(rng, height, width, number % 3)
        given_mask = mask.copy()
        for gradients in ("normal", "mixed"):
            ours = blend(background, patch, mask, gradients)
            theirs = blend_opencv(background, patch, mask, gradients)
            apart = np.abs(ours.astype(int) - theirs)
            assert apart.max() <= 1, (number, gradients)
            means.append(apart.mean())
            box = bounding_box(mask)
            outside = np.ones_like(mask)
            if box is not None:
                outside[box] = False
            assert np.array_equal(ours[outside], background[outside])
        assert np.array_equal(mask, given_mask)
    assert np.mean(means) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (12, 9), (20, 20)])
@pytest.mark.parametrize("largest", [0, 256])
def test_the_solver_equals_a_sparse_solver(
    height: int, width: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solver is tested with its two transforms: sine matrices, and the fast transform."""
    monkeypatch.setattr("anomaly_clip.synthesis.poisson.LARGEST_PRODUCT", largest)

    def second_difference(size: int) -> sparse.spmatrix:
        ones = np.ones(size)
        return sparse.diags([ones[1:], -2 * ones, ones[1:]], [-1, 0, 1])

    laplace = sparse.kron(second_difference(height), sparse.eye(width)) + sparse.kron(
        sparse.eye(height), second_difference(width)
    )
    laplacians = np.random.default_rng(0).normal(size=(3, height, width)) * 50
    for solution, laplacian in zip(solve(laplacians), laplacians, strict=True):
        plain = spsolve(laplace.tocsc(), laplacian.ravel()).reshape(height, width)
        np.testing.assert_allclose(solution, plain, rtol=0, atol=1e-8)


def test_blending_an_image_into_itself_changes_nothing() -> None:
    image = noise_image(np.random.default_rng(0), 50, 60, 1)
    mask = shapes(np.random.default_rng(0), 50, 60, 2)
    for gradients in ("normal", "mixed"):
        assert np.array_equal(blend(image, image, mask, gradients), image)
        brighter = np.minimum(image, 200) + np.uint8(40)  # the same gradients
        assert np.array_equal(blend(np.minimum(image, 200), brighter, mask), np.minimum(image, 200))
    with pytest.raises(ValueError, match="must have the same size"):
        blend(image, image[1:], mask)
    assert np.array_equal(blend(image, image[::-1].copy(), np.zeros_like(mask)), image)
