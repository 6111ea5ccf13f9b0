"""Mutual scoring of images (MuSc, arXiv 2401.16753), as pure functions on any device.

Patches of an image are compared with those of the other images of its category. A normal patch has
a similar patch in many of them, an abnormal one in few.

Letters in shapes, besides those of :mod:`anomaly_clip.records`:

======  ==================================================================
``n``   images that are compared with each other
``m``   images that a patch is compared with
======  ==================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.clip import unit
from anomaly_clip.errors import check_at_least
from anomaly_clip.memory import available_memory

__all__ = [
    "RecentImages",
    "aggregate",
    "bounds",
    "check_interval",
    "check_k_list",
    "check_neighbourhood",
    "largest_cosines",
    "mean_of_nearest",
    "mutual_scores",
    "rescore",
    "rescore_in_sequence",
    "room_on",
    "sequential_scores",
    "table_of_pairs",
    "table_of_rows",
    "weighted_means",
    "window",
]

PATCHES_AT_ONCE = {"cpu": 1024, "else": 8192}
"""Patches on each side of a product: on a CPU, it stays in the cache until it is reduced."""
ROOM = 1 / 5
"""Share of the free memory that a table, or what is kept of a sequence, may take."""


def aggregate(grids: Tensor, r: int) -> Tensor:
    """Average patch features over neighbourhoods (LNAMD); return unit vectors ``(n, N, C)``.

    The values of an image are standardised over all channels and positions, then averaged over
    ``r`` x ``r`` positions. Positions outside of the image count as zeros.

    Args:
        grids: Patch features ``(n, C, h, w)``.
        r: Side of the neighbourhood, in patches: odd.

    Raises:
        ValueError: If ``r`` is not an odd number.
    """
    check_neighbourhood(r)
    grids = F.layer_norm(grids.float(), grids.shape[1:])  # eps 1e-5, biased variance
    # On a CPU, this memory format makes the average four times as fast, and results contiguous.
    grids = grids.contiguous(memory_format=torch.channels_last)
    if r > 1:
        grids = F.avg_pool2d(grids, r, stride=1, padding=r // 2)
    return unit(grids.permute(0, 2, 3, 1).flatten(1, 2))  # (n, N, C)


def check_neighbourhood(r: int) -> None:
    """Check the side of a neighbourhood: an even one would have no centre.

    Raises:
        ValueError: If it is not an odd number.
    """
    if r < 1 or r % 2 == 0:
        raise ValueError(
            f"model.r_list: a neighbourhood of {r} patches has no centre: give odd numbers, such "
            f"as 1, 3, 5"
        )


def check_interval(interval: Sequence[float], option: str = "model.interval") -> None:
    """Check an interval: two shares in [0, 1], or counts of images from 1.

    Raises:
        ValueError: If it is none, or empty.
    """
    if len(interval) != 2:
        raise ValueError(f"{option} {list(interval)}: give two values, such as [0, 0.3]")
    for bound in interval:
        check_at_least(option, bound, 0)
        if bound > 1 and bound % 1 != 0:
            raise ValueError(
                f"{option} {list(interval)}: {bound} is neither a share from 0 to 1 nor a number "
                f"of images: give, for example, [0, 0.3]"
            )
    if interval[0] == interval[1] and _is_share(interval[0]) == _is_share(interval[1]):
        raise ValueError(f"{option} {list(interval)} is empty: give, for example, [0, 0.3]")


def check_k_list(k_list: Sequence[int]) -> None:
    """Check numbers of images.

    Raises:
        ValueError: If there is none, or one is negative.
    """
    if not k_list or min(k_list) < 0:
        raise ValueError(
            f"model.k_list {list(k_list)}: give numbers of images from 1, such as [1, 2, 3], or "
            f"[0] to leave image scores as they are"
        )


def bounds(interval: Sequence[float], m: int) -> tuple[int, int]:
    """Return the first rank and the rank after the last one of an interval of ``m`` values.

    Fractions are rounded down, and at least one value is left (our choice: the published code
    returns NaN for fewer than 5 images). A count of 1 is an integer; 1.0 means all values.

    Example:
        >>> from anomaly_clip.methods.mutual_scoring import bounds
        >>> bounds([0, 0.3], 10), bounds([0, 0.3], 3), bounds([0, 1], 10), bounds([0, 1.0], 10)
        ((0, 3), (0, 1), (0, 1), (0, 10))
    """
    low, high = sorted(_rank(bound, m) for bound in interval)
    low = min(low, m - 1)
    return low, min(max(high, low + 1), m)


def _rank(bound: float, m: int) -> int:
    return math.floor(bound * m) if _is_share(bound) else int(bound)


def _is_share(bound: float) -> bool:
    return bound < 1 or (isinstance(bound, float) and bound == 1)


def mean_of_nearest(cosines: Tensor, interval: Sequence[float], m: int) -> Tensor:
    """Return the mean distance of patches from the images in an interval of nearness (MSM).

    Args:
        cosines: ``(..., images)``, the largest cosine of a patch with the patches of each image;
            minus infinity for images that it is not compared with.
        interval: See :func:`check_interval`; of the ranks from the nearest image.
        m: Number of images that each patch is compared with.

    Returns:
        Euclidean distances of unit vectors ``(...)`` in [0, 2].
    """
    low, high = bounds(interval, m)
    nearest = cosines.topk(high, dim=-1).values[..., low:]  # (..., high - low)
    return (2 - 2 * nearest).clamp(min=0).sqrt().mean(dim=-1)


def mutual_scores(
    features: Tensor,
    interval: Sequence[float] = (0, 0.3),
    rows: Sequence[int] | None = None,
    room: int | None = None,
    advance: Callable[[], object] | None = None,
) -> Tensor:
    """Return the score of each patch: its mean distance from the nearest other images.

    Every pair of images is compared once if the table of all pairs fits into the memory. Otherwise,
    or for some of the images, blocks of images are compared with all; this takes twice the time.

    Args:
        features: Unit vectors ``(n, N, C)`` of the patches of all images.
        interval: Images whose distances are averaged, by rank; see :func:`check_interval`.
        rows: Images to score, in ascending order; default: all.
        room: Bytes that a table may take; default: a fifth of the free memory.
        advance: Called before each image that is compared with others.

    Returns:
        float32 ``(rows, N)`` in [0, 2].

    Raises:
        ValueError: If there are fewer than two images.
    """
    n, num_patches = features.shape[:2]
    if n < 2:
        raise ValueError(f"MuSc compares images with each other, but got {n}: give at least 2")
    room = room_on(features.device) if room is None else room
    of_image = num_patches * n * 4
    if rows is None and of_image * n <= room:
        return _scores_of_table(table_of_pairs(features, advance), interval)
    numbers = torch.arange(n) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    parts = [features.new_zeros(0, num_patches)]
    for block in numbers.split(max(1, room // of_image)) if len(numbers) else ():
        parts.append(_scores_of_table(table_of_rows(features, block, advance=advance), interval))
    return torch.cat(parts)


def _scores_of_table(table: Tensor, interval: Sequence[float]) -> Tensor:
    """Return the patch scores ``(rows, N)`` of a table, image by image, which takes less memory."""
    return torch.stack([mean_of_nearest(rows, interval, table.shape[2] - 1) for rows in table])


def table_of_pairs(features: Tensor, advance: Callable[[], object] | None = None) -> Tensor:
    """Return the largest cosine of each patch with the patches of each other image, ``(n, N, n)``.

    The product of two images gives both directions: rows belong to the patches of the first image,
    columns to those of the second. The image itself has minus infinity.
    """
    n, num_patches = features.shape[:2]
    table = features.new_full((n, num_patches, n), -torch.inf)
    size = _images_at_once(features)
    for first in range(0, n, size):
        block = slice(first, min(n, first + size))
        for row in range(first, block.stop):
            _call(advance)
            _compare(features, table, slice(row, row + 1), slice(row + 1, block.stop))
        for start in range(block.stop, n, size):
            _compare(features, table, block, slice(start, min(n, start + size)))
    return table


def _compare(features: Tensor, table: Tensor, rows: slice, columns: slice) -> None:
    """Compare two blocks of images, none of which is in both, and fill the table both ways."""
    if columns.start >= columns.stop:
        return
    cosines = _cosines(features[rows], features[columns])  # (a, N, b, N)
    table[rows, :, columns] = cosines.amax(dim=3)
    table[columns, :, rows] = cosines.amax(dim=1).permute(1, 2, 0)


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines ``(a, N, b, N)`` of the patches of two blocks of images."""
    product = first.flatten(0, 1) @ second.flatten(0, 1).T  # (a * N, b * N)
    return product.view(*first.shape[:2], *second.shape[:2])


def table_of_rows(
    features: Tensor,
    rows: Sequence[int] | Tensor,
    others: slice = slice(None),
    advance: Callable[[], object] | None = None,
) -> Tensor:
    """Return some rows of the table, ``(rows, N, others)``; see :func:`table_of_pairs`.

    Args:
        features: Unit vectors ``(n, N, C)``.
        rows: Images whose patches are compared.
        others: Consecutive images that they are compared with; default: all.
        advance: Called before each image that is compared with others.
    """
    rows = torch.as_tensor(rows, dtype=torch.int64, device=features.device)
    first, stop, _ = others.indices(len(features))
    table = features.new_empty(len(rows), features.shape[1], stop - first)
    size = _images_at_once(features)
    for place in range(0, len(rows), size):
        block = features[rows[place : place + size]]
        for _ in block:
            _call(advance)
        table[place : place + size] = largest_cosines(block, features[first:stop])
    for place, row in enumerate(rows.tolist()):
        if first <= row < stop:
            table[place, :, row - first] = -torch.inf
    return table


def largest_cosines(features: Tensor, others: Tensor) -> Tensor:
    """Return the largest cosine of each patch with the patches of each other image.

    Args:
        features: Unit vectors ``(a, N, C)``.
        others: Unit vectors ``(m, N, C)`` of the images that they are compared with.

    Returns:
        ``(a, N, m)``.
    """
    parts = []
    for block in others.split(_images_at_once(features)):
        parts.append(_cosines(features, block).amax(dim=3))  # (a, N, b)
    return torch.cat(parts, dim=2)


class RecentImages:
    """The unit features of the last images of a sequence, in no order (a ring buffer).

    Args:
        memory: Number of images that are kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._count = 0
        self._buffer: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """Unit vectors ``(m, N, C)`` of the images that are kept."""
        assert self._buffer is not None
        return self._buffer[: self._count]

    def add(self, image: Tensor) -> None:
        """Keep the features ``(N, C)`` of an image, and forget the oldest if there are too many."""
        size = 0 if self._buffer is None else len(self._buffer)
        if self._count == size < self.memory:
            grown = image.new_empty(min(self.memory, max(16, 2 * size)), *image.shape)
            if self._buffer is not None:
                grown[:size] = self._buffer
            self._buffer = grown
        assert self._buffer is not None
        self._buffer[self._count % self.memory] = image
        self._count += 1


def window(position: int, start: int, memory: int) -> slice:
    """Return the images of a sequence that one of them is compared with (our choice).

    These are the ``memory`` images before it. The first ``start`` images are compared with each
    other, as they have too few before them.

    Example:
        >>> from anomaly_clip.methods.mutual_scoring import window
        >>> window(1, start=3, memory=5), window(3, start=3, memory=5), window(9, start=3, memory=5)
        (slice(0, 3, None), slice(0, 3, None), slice(4, 9, None))
    """
    if position < start:
        return slice(0, start)
    return slice(max(0, position - memory), position)


def sequential_scores(
    features: Tensor,
    interval: Sequence[float],
    start: int,
    memory: int,
    rows: Sequence[int],
    advance: Callable[[], object] | None = None,
    recent: RecentImages | None = None,
) -> Tensor:
    """Return the score of each patch of a sequence of images; see :func:`window`.

    Args:
        features: Unit vectors ``(n, N, C)``, in the order of the sequence.
        interval: As in :func:`mutual_scores`, of the images that an image is compared with.
        start: Number of first images that are compared with each other, at least 2; 0 with
            ``recent``.
        memory: Number of images before an image that it is compared with.
        rows: Positions of the images to score.
        advance: Called before each image that is compared with others.
        recent: Up to ``memory`` images before these, to which these are added; default: none.

    Returns:
        float32 ``(rows, N)`` in [0, 2].
    """
    recent = RecentImages(memory) if recent is None else recent
    places = {row: place for place, row in enumerate(rows)}
    scores = features.new_empty(len(rows), features.shape[1])
    for position, image in enumerate(features):
        if position in places:
            _call(advance)
            if position < start:
                table = table_of_rows(features, [position], slice(0, start))  # (1, N, images)
            else:
                table = largest_cosines(image[None], recent.features)
            m = table.shape[2] - (position < start)
            scores[places[position]] = mean_of_nearest(table[0], interval, m)
        recent.add(image)
    return scores


def rescore(raw: Tensor, class_vectors: Tensor, k_list: Sequence[int]) -> Tensor:
    """Average image scores over images of similar class vectors (RsCIN).

    Scores are scaled to [0, 1] first. Each score then becomes the mean of those of the ``k``
    images with the most similar class vectors, including the image itself, weighted by cosine; the
    results are averaged over all ``k``.

    Args:
        raw: Image scores ``(n,)``.
        class_vectors: Unit vectors ``(n, D)``.
        k_list: Numbers of images; larger ones than ``n`` count as ``n``. With a 0 in the list,
            scores are returned as they are.

    Returns:
        float32 ``(n,)``; zeros if all scores are equal.
    """
    if 0 in k_list:
        return raw
    low, high = raw.aminmax()
    scaled = (raw - low) / (high - low) if high > low else torch.zeros_like(raw)
    return weighted_means(scaled, class_vectors @ class_vectors.T, k_list)


def rescore_in_sequence(
    raw: Tensor,
    class_vectors: Tensor,
    k_list: Sequence[int],
    start: int,
    memory: int,
    rows: Sequence[int],
) -> Tensor:
    """Average image scores of a sequence over similar images that came before (our choice).

    Scores are not scaled: the range of those seen so far changes, and scores would not be
    comparable. Scaling does not change the order, as the means are weighted.

    Args:
        raw: Image scores ``(n,)`` in the order of the sequence.
        class_vectors: Unit vectors ``(n, D)``.
        k_list: See :func:`rescore`.
        start: See :func:`sequential_scores`.
        memory: See :func:`sequential_scores`.
        rows: Positions of the images to score.

    Returns:
        float32 ``(rows,)``.
    """
    scores = raw[list(rows)].clone()
    if 0 in k_list:
        return scores
    for place, row in enumerate(rows):
        seen = window(row, start, memory)
        stop = max(seen.stop, row + 1)  # the image itself is the most similar one
        compared = slice(seen.start, stop)
        cosines = class_vectors[row : row + 1] @ class_vectors[compared].T  # (1, images)
        scores[place] = weighted_means(raw[compared], cosines, k_list)[0]
    return scores


def weighted_means(scores: Tensor, cosines: Tensor, k_list: Sequence[int]) -> Tensor:
    """Return the means ``(rows,)`` of the scores of the most similar images.

    Args:
        scores: ``(n,)``.
        cosines: ``(rows, n)``, similarity of images with all.
        k_list: See :func:`rescore`.
    """
    nearest = cosines.topk(min(max(k_list), len(scores)), dim=1)
    means = []
    for k in k_list:
        weights, chosen = nearest.values[:, :k], scores[nearest.indices[:, :k]]  # (rows, k)
        means.append((weights * chosen).sum(dim=1) / weights.sum(dim=1))
    return torch.stack(means).mean(dim=0)


def _call(advance: Callable[[], object] | None) -> None:
    if advance is not None:
        advance()


def _images_at_once(features: Tensor) -> int:
    at_once = PATCHES_AT_ONCE["cpu" if features.device.type == "cpu" else "else"]
    return max(1, at_once // features.shape[1])


def room_on(device: torch.device) -> int:
    """Return the bytes that a table may take on a device; unlimited if its memory is unknown."""
    free = available_memory(device)
    return 1 << 62 if free is None else int(ROOM * free)
