"""Cross-conformal p-values: calibration with few normal images, in folds.

The normal images are divided into ``K`` folds, and each fold is scored by a model that was fitted
on the other folds. So every image is used for the fit and for the calibration (Vovk 2015,
"Cross-conformal predictors"). There are two models to decide with:

- All ``K`` models: a new image is compared with each fold by the model of that fold. The
  false-alarm rate is close to ``alpha`` in practice, but only about ``2 alpha`` is proven:
  see `proven_rate`.
- One model that is fitted on all images: its scores are compared with the pooled scores of the
  folds. They come from models of fewer images, so that nothing is proven: see `pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.conformal import plain_rate
from anomaly_clip.errors import check_between

__all__ = ["cross_p_values", "pooled", "proven_rate"]


def cross_p_values(scores: ArrayLike, folds: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return cross-conformal p-values (Vovk 2015, "Cross-conformal predictors").

    Args:
        scores: Scores ``(m, K)`` of new images by the ``K`` models; higher = more anomalous.
        folds: Scores of each fold by the model that was fitted without it, ``K`` arrays.

    Returns:
        ``(m,)``: ``(1 + #{images of any fold >= the score by its model}) / (n + 1)``.

    Raises:
        ValueError: If there are not as many folds as columns, a fold is empty, or a score is NaN.

    Example:
        >>> from anomaly_clip.decisions.cross_conformal import cross_p_values
        >>> cross_p_values([[1.0, 20.0]], [[0.0, 2.0], [10.0, 11.0]]).tolist()
        [0.4]
    """
    new = np.atleast_2d(np.asarray(scores, dtype=np.float64))  # (m, K)
    ascending = _sorted_folds(folds)
    if new.shape[1] != len(ascending) or np.isnan(new).any():
        raise ValueError(f"scores of shape {new.shape}: expected numbers, and {len(folds)} columns")
    at_least = np.zeros(len(new), dtype=np.int64)
    for column, fold in zip(new.T, ascending, strict=True):
        at_least += len(fold) - np.searchsorted(fold, column, side="left")
    return np.asarray((1 + at_least) / (1 + sum(map(len, ascending))))


def proven_rate(alpha: float, num_images: int, num_folds: int) -> float:
    """Return an upper bound of the false-alarm rate of ``p <= alpha`` with all ``K`` models.

    The cross-conformal p-value is ``((n + K) mean - K + 1) / (n + 1)``, with the mean of the
    p-values of the folds, weighted by their sizes plus one. The mean of p-values is at most ``t``
    with a probability of at most ``2 t``, whatever their dependence (Rüschendorf 1982; Vovk and
    Wang 2020, "Combining p-values via averaging"). So the bound is ``2 alpha + 2 (1 - alpha)
    (K - 1) / (n + K)`` (Gasparin and Ramdas 2025, "Improving the statistical efficiency of
    cross-conformal prediction").

    Args:
        alpha: In (0, 1).
        num_images: Number ``n`` of images in all folds.
        num_folds: ``K``, 2..n.

    Example:
        >>> from anomaly_clip.decisions.cross_conformal import proven_rate
        >>> round(proven_rate(0.05, 100, 5), 3), round(proven_rate(0.05, 10_000, 5), 3)
        (0.172, 0.101)
    """
    check_between("number of folds", num_folds, 2, num_images)
    largest_mean = (plain_rate(alpha) * (num_images + 1) + num_folds - 1) / (num_images + num_folds)
    return min(1.0, 2 * largest_mean)


def pooled(
    folds: Sequence[ArrayLike],
    map_threshold: float | None = None,
    images: Sequence[str] = (),
    words: str | None = None,
) -> CategoryCalibration:
    """Return the calibration of a model that was fitted on the images of all folds.

    Args:
        folds: See `cross_p_values`.
        map_threshold: See `CategoryCalibration`.
        images: See `CategoryCalibration`.
        words: See `CategoryCalibration`.

    Raises:
        ValueError: If a fold is empty, there are fewer than two, or a score is not finite.
    """
    check_between("number of folds", len(folds), 2, float("inf"))
    scores = np.sort(np.concatenate(_sorted_folds(folds)))
    return CategoryCalibration(
        tuple(scores.tolist()),
        map_threshold,
        images=tuple(images),
        words=words,
        kind="cross_validation",
    )


def _sorted_folds(folds: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    ascending = [np.sort(np.asarray(fold, dtype=np.float64).reshape(-1)) for fold in folds]
    for number, fold in enumerate(ascending, 1):
        if not len(fold) or np.isnan(fold[-1]):  # NaN is sorted last
            raise ValueError(f"fold {number} of {len(folds)}: expected one or more numbers")
    return ascending
