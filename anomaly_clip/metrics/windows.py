"""Windows: histograms with equal bins over the range of scores in which a batch lies.

A window counts the pixels of further batches by addition, in little more than the time of a
conversion to 16 bits. It counts only pixels that it separates. Pixels outside its range, and pixels
of a *crowded* bin, which holds too many of the pixels that rank above it, are handed back. They
go to the next window or, at last, to :func:`separated`, which zooms in on them, or sorts them.

The bins of a linear window are the scores that round to ``k * 2**exponent`` for successive integers
k. A score times a power of two is exact, so the bin of a score has no error. No bin is narrower
than half the distance between two scores. Windows of different batches and processes often have the
same bins, whose counts then add up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_clip.metrics.bins import CELLS, Bins, grouped

__all__ = [
    "CHUNK",
    "FEW",
    "NUM_BINS",
    "HalfWindow",
    "LinearWindow",
    "Pixels",
    "Window",
    "halves",
    "histogram",
    "looked_up",
    "separated",
    "sorted_bins",
]

Scores = NDArray[Any] | Tensor
"""float32 ``(n,)``: an array on the CPU, a tensor on another device. Half-precision scores are
given by their 16-bit patterns, as unsigned integers."""

NUM_BINS = 1 << 15
PATTERNS = 1 << 16
"""Number of scores in half precision."""
BLOCK = 1 << 16
"""Pixels converted at once, so that intermediate results stay in the processor's cache."""
CHUNK = 1 << 23
"""Pixels counted at once; `cv2.calcHist` counts in float32, exact up to 2^24."""
FEW = 1 << 14
"""Up to this many pixels are sorted, which costs less than a histogram."""
MOST = 1 << 14
"""Number of bins above which they are grouped."""
NEGLIGIBLE = 16
"""A bin with one in two to this power of the pixels of a batch, or fewer, is not crowded."""
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = -149
"""Binary logarithm of the smallest positive float32 score."""
LARGE = 100
"""Powers of two that float32 holds with room to spare."""
INTEGERS = 1 << 23
"""float32 has only integers from here to its double, so a sum in between is rounded to one. The
last digits of its pattern are then those of the integer."""
WIDE_TABLES = int(cv2.__version__.split(".")[0]) >= 5
"""True if OpenCV looks up 16-bit keys."""
OUTER = 8
"""Unused bins at the upper end. The upper end of the others is then exact in float32."""


class Pixels(NamedTuple):
    """All pixels of some images, and the anomalous ones again."""

    scores: Scores
    defects: NDArray[Any]
    """Scores of the anomalous pixels, ``(d,)``."""
    weights: NDArray[np.float64]
    """One over the size of the region of each anomalous pixel, ``(d,)``."""
    extremes: tuple[float, float] | None = None
    """Lowest and highest score, if they have been computed already."""

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest score."""
        return self.extremes or (float(self.scores.min()), float(self.scores.max()))

    def cpu(self) -> Pixels:
        """Return the pixels with all scores on the CPU."""
        scores = self.scores
        return (
            self if isinstance(scores, np.ndarray) else self._replace(scores=scores.cpu().numpy())
        )


class Window(ABC):
    """Pixel counts of disjoint bins in ascending order.

    Args:
        num_bins: Number of bins.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.clear()

    def clear(self) -> None:
        """Forget all pixels."""
        self.counts = np.zeros(self.num_bins, np.int64)
        self.positives = np.zeros(self.num_bins, np.int64)
        self.regions = np.zeros(self.num_bins)

    @abstractmethod
    def edges(self, bins: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lowest and the highest score of each of some bins."""

    @abstractmethod
    def keys(self, scores: Scores, inside: bool = False) -> Scores:
        """Return the number of the bin of each score, as integers.

        Args:
            scores: Scores.
            inside: All of them lie in the range of the window.
        """

    def holds(self, extremes: tuple[float, float] | None) -> bool:
        """Return True if all scores between these two lie in the range of the window."""
        return False

    @abstractmethod
    def not_separated(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the bins whose pixels are not separated, given the counts of a batch."""

    def count(self, pixels: Pixels) -> Pixels | None:
        """Count the pixels that the window separates, and return the others, if there are any."""
        inside = self.holds(pixels.extremes)
        keys = self.keys(pixels.scores, inside)
        hit = np.asarray(self.keys(pixels.defects, inside))
        counts = histogram(keys, self.num_bins)
        left = self.not_separated(counts)
        rest = None
        weights = pixels.weights
        if int(counts[left].sum()) == len(keys):
            return pixels
        if left.any():
            others = left[hit]
            scores = pixels.scores[with_keys(keys, left)]
            rest = Pixels(scores, pixels.defects[others], weights[others])
            hit, weights = hit[~others], weights[~others]
            counts[left] = 0
        self.counts += counts
        if len(hit):
            self.positives += np.bincount(hit, minlength=self.num_bins)
            self.regions += region_sums(hit, weights, self.num_bins)
        return rest

    def bins(self) -> Bins:
        """Return the occupied bins."""
        chosen = np.flatnonzero(self.counts)
        low, high = self.edges(chosen)
        positives = self.positives[chosen]
        return Bins(low, high, positives, self.counts[chosen] - positives, self.regions[chosen])


class HalfWindow(Window):
    """One bin for each score in half precision, so nothing is crowded.

    Args:
        dtype: torch.float16 or torch.bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        super().__init__(PATTERNS)

    def edges(self, bins: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the score of each pattern, twice; NaN and infinite scores do not occur."""
        patterns = torch.from_numpy(bins.astype(np.uint16).view(np.int16))
        values = patterns.view(self.dtype).double().numpy()
        return values, values

    def bins(self) -> Bins:
        """Return the occupied bins; zero and minus zero share one."""
        for counts in (self.counts, self.positives, self.regions):
            counts[0] += counts[0x8000]
            counts[0x8000] = 0
        return super().bins()

    def keys(self, scores: Scores, inside: bool = False) -> Scores:
        """Return the patterns themselves."""
        return scores

    def not_separated(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return no bin."""
        return np.zeros(self.num_bins, bool)


class LinearWindow(Window):
    """Equal bins around multiples of their width; the first one and the last ones are not used.

    Args:
        exponent: Binary logarithm of the width of a bin.
        first: Centre of the first bin, as a multiple of the width: a multiple of 2^13 below 2^26.
        num_bins: Number of bins.
        cells: A bin is crowded if it holds more than one in this many of the pixels of a batch
            that rank at or above it.
    """

    def __init__(
        self, exponent: int, first: int, num_bins: int = NUM_BINS, cells: int = CELLS
    ) -> None:
        self.exponent = exponent
        self.first = first
        self.cells = cells
        super().__init__(num_bins)
        self.last = num_bins - OUTER
        # Beyond this multiple of the width, scores are no closer to each other than the width.
        multiples = np.arange(first, first + num_bins, dtype=np.int64)
        self.exact = (np.abs(multiples) > INTEGERS) | (exponent == SMALLEST)

    @classmethod
    def around(
        cls, low: float, high: float, num_bins: int = NUM_BINS, cells: int = CELLS
    ) -> LinearWindow:
        """Place a window so that a range of scores lies well inside it.

        The range covers 40 % to 81 % of the window, unless this would make bins narrower than the
        distance between float32 scores.
        """
        step = num_bins // 8  # beginnings are multiples of this, so that similar ranges agree
        room = num_bins - 2 * OUTER - step - step // 2
        smallest = min(abs(low), abs(high)) if low * high > 0 else 0.0
        exponent = max(math.frexp(smallest)[1] - 25, SMALLEST) if smallest else SMALLEST
        if high > low:
            exponent = max(math.ceil(math.log2(high - low) - math.log2(room)), exponent)
        start = math.ldexp(low, -exponent) - step // 4
        return cls(exponent, math.floor(start / step) * step, num_bins, cells)

    def same_bins(self, other: LinearWindow) -> bool:
        """Return True if another window has the same bins."""
        return (self.exponent, self.first) == (other.exponent, other.first)

    def edges(self, bins: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lowest and the highest float32 score of each of some bins."""
        even = bins % 2 == 0
        columns = []
        for half, inwards in ((-0.5, np.inf), (0.5, -np.inf)):
            edges = np.ldexp(self.first + bins + half, self.exponent)
            edges = np.clip(edges, -LARGEST, LARGEST)
            near = edges.astype(np.float32)
            beyond = near < edges if half < 0 else near > edges
            # A score halfway between two integers is rounded to the even one, as is the first.
            beyond |= (near == edges) & ~even
            with np.errstate(over="ignore"):  # in bins beyond all scores, which stay empty
                next_ones = np.nextafter(near, np.float32(inwards))
            columns.append(np.where(beyond, next_ones, near).astype(np.float64))
        return columns[0], columns[1]

    def ends(self) -> tuple[float, float]:
        """Return the scores at the centres of the first bin and of bin `last`."""
        ends = np.ldexp([self.first, self.first + self.last], self.exponent)
        low, high = np.clip(ends, -LARGEST, LARGEST).astype(np.float32)
        return float(low), float(high)

    def holds(self, extremes: tuple[float, float] | None) -> bool:
        """Return True if all scores between these two lie in the range of the window."""
        low, high = self.ends()
        return extremes is not None and low <= extremes[0] and extremes[1] <= high

    def keys(self, scores: Scores, inside: bool = False) -> Scores:
        """Return the bin of each score; 0 and `last` if it lies outside."""
        low, high = self.ends()
        up = LARGE if self.exponent < -LARGE else 0  # 2**149 exceeds the range of float32
        scale, shift = 2.0 ** -(self.exponent + up), float(INTEGERS - self.first)
        if isinstance(scores, Tensor):
            sums = scores.clamp(low, high) * 2.0**up * scale + shift
            return sums.view(torch.int32) & (self.num_bins - 1)
        keys = np.empty(len(scores), np.uint16 if self.num_bins <= PATTERNS else np.int32)
        buffer = np.empty(min(BLOCK, len(scores)), np.float32)
        for start in range(0, len(scores), BLOCK):
            block = scores[start : start + BLOCK]
            place = buffer[: len(block)]
            if not inside:
                block = np.clip(block, np.float32(low), np.float32(high), out=place)
            np.multiply(block, np.float32(2.0**up if up else scale), out=place)
            if up:
                place *= np.float32(scale)
            place += np.float32(shift)
            keys[start : start + BLOCK] = place.view(np.int32)  # modulo 2^16
        return keys if self.num_bins <= PATTERNS else keys & (self.num_bins - 1)

    def not_separated(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return the crowded bins and those outside."""
        at_or_above = counts[::-1].cumsum()[::-1]
        few = max(1, int(at_or_above[0]) >> NEGLIGIBLE)
        left = np.zeros(self.num_bins, bool)
        full = np.flatnonzero(counts > few)
        left[full] = (counts[full] * self.cells > at_or_above[full]) & ~self.exact[full]
        ends = [0, self.last]
        left[ends] = counts[ends] > 0
        return left


def histogram(keys: Scores, num_bins: int) -> NDArray[np.int64]:
    """Count integers below a number, on any device."""
    if isinstance(keys, Tensor):
        return torch.bincount(keys, minlength=num_bins).cpu().numpy()
    if keys.dtype != np.uint16:
        return np.bincount(keys, minlength=num_bins)
    counts = np.zeros(num_bins, np.int64)
    for start in range(0, len(keys), CHUNK):
        part = keys[start : start + CHUNK].reshape(1, -1)  # the shape that calcHist expects
        # Several times faster than bincount, which converts to 64 bits.
        counts += (
            cv2.calcHist([part], [0], None, [num_bins], [0, num_bins]).ravel().astype(np.int64)
        )
    return counts


def with_keys(keys: Scores, chosen: NDArray[np.bool_]) -> Any:
    """Return the places of the chosen keys."""
    if isinstance(keys, Tensor):
        return torch.from_numpy(chosen).to(keys.device)[keys].nonzero().squeeze(1)
    return np.flatnonzero(looked_up(chosen, keys))


def looked_up(table: NDArray[np.bool_], keys: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return the entry of each key, all of which are smaller than the length of the table."""
    if not WIDE_TABLES or keys.dtype != np.uint16:
        return table.take(keys, mode="clip")  # faster than an index, because nothing is checked
    whole = np.zeros(PATTERNS, np.uint8)
    whole[: len(table)] = table
    return cv2.LUT(keys.reshape(1, -1), whole.reshape(1, -1)).reshape(-1).view(np.bool_)


def separated(pixels: Pixels, cells: int = CELLS) -> Bins:
    """Return narrow bins of any pixels, in memory that does not grow with their number.

    Bins with a single score become exact. Others are divided by windows of their own; scores in
    several clusters are first cut in two.

    Args:
        pixels: float32 scores on the CPU.
        cells: See :func:`~anomaly_clip.metrics.bins.grouped`.
    """
    parts, todo = [], [pixels]
    while todo:
        some = todo.pop()
        if len(some.scores) <= FEW:
            parts.append(sorted_bins(some))
            continue
        low, high = some.range()
        window = LinearWindow.around(low, high)
        rest = window.count(some)
        parts.append(window.bins())
        if rest is not None:
            ties, rest = tied(rest, window)
            parts.append(ties)
        if rest is not None:
            todo += halves(rest) if len(rest.scores) > len(some.scores) // 2 else [rest]
    bins = Bins(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return grouped(bins, cells) if len(bins.low) > MOST else bins


def halves(pixels: Pixels) -> list[Pixels]:
    """Return the pixels at or below, and those above, the middle of the range of scores.

    The middle lies between as many float32 numbers, so scores over many powers of two are soon
    separated.
    """
    low, high = (np.float32(score) for score in pixels.range())
    patterns = [int(abs(score).view(np.int32)) * (1 if score >= 0 else -1) for score in (low, high)]
    middle = sum(patterns) // 2
    size = np.int32(abs(middle)).view(np.float32)
    threshold = size if middle >= 0 else -size
    upper, defects = pixels.scores > threshold, pixels.defects > threshold
    return [
        Pixels(pixels.scores[~upper], pixels.defects[~defects], pixels.weights[~defects]),
        Pixels(pixels.scores[upper], pixels.defects[defects], pixels.weights[defects]),
    ]


def tied(pixels: Pixels, window: Window) -> tuple[Bins, Pixels | None]:
    """Return exact bins of the pixels in bins with a single score, and the other pixels."""
    scores = pixels.scores
    assert isinstance(scores, np.ndarray)
    keys, hit = (np.asarray(window.keys(some)) for some in (scores, pixels.defects))
    score = np.zeros(window.num_bins, np.float32)
    score[keys] = scores
    several = np.zeros(window.num_bins, bool)
    several[keys[score[keys] != scores]] = True
    counts = histogram(keys, window.num_bins)
    chosen = np.flatnonzero((counts > 0) & ~several)
    positives = np.bincount(hit, minlength=window.num_bins)[chosen]
    value = score[chosen].astype(np.float64) + 0.0
    regions = region_sums(hit, pixels.weights, window.num_bins)[chosen]
    bins = Bins(value, value, positives, counts[chosen] - positives, regions)
    left = several[keys]
    if not left.any():
        return bins, None
    others = several[hit]
    return bins, Pixels(scores[left], pixels.defects[others], pixels.weights[others])


def sorted_bins(pixels: Pixels) -> Bins:
    """Return an exact bin for each distinct score; the plain form of :func:`separated`."""
    values, counts = np.unique(pixels.scores, return_counts=True)
    place = np.searchsorted(values, pixels.defects)
    positives = np.bincount(place, minlength=len(values))
    regions = region_sums(place, pixels.weights, len(values))
    value = values.astype(np.float64) + 0.0
    return Bins(value, value, positives, counts - positives, regions)


def region_sums(
    keys: NDArray[np.integer], weights: NDArray[np.float64], num_bins: int
) -> NDArray[np.float64]:
    """Return the sum of the weights of each key."""
    return np.bincount(keys, weights, minlength=num_bins).astype(np.float64, copy=False)
