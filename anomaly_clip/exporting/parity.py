"""Comparison of an exported program with torch, on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_clip.decisions.calibration import CategoryCalibration, scaled_score
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.graph import OUTPUTS, DetectorGraph
from anomaly_clip.progress import number_of

__all__ = [
    "BOUNDS",
    "Arrays",
    "Difference",
    "Run",
    "batches_of",
    "check_difference",
    "compare",
    "constant_outputs",
    "decision_scores",
    "eager_run",
    "num_flips",
    "outputs_of",
    "tolerance_of",
]

Arrays = Mapping[str, NDArray[np.float32]]
"""Outputs of a program by name."""
Run = Callable[[NDArray[np.uint8]], Arrays]
"""A program: images ``(B, 3, S, S)`` in, outputs out."""

BOUNDS = {"anomaly_map": 1e-5, "image_score": 1e-4, "score_parts": 1e-4}
"""Largest differences of a float32 program, as :class:`Difference` states them. Those of scores are
our choice: a logit scale of 100 enlarges the roundings of cosines."""


ROUNDING = 1e-5
"""Share of the largest calibration score by which a score must exceed the threshold elsewhere.

The calibration image whose score is the threshold is normal here. Without this, another program
would call it anomalous if it rounds up.
"""


@dataclass(frozen=True)
class Difference:
    """Largest differences between a program and torch; None for an output that does not exist.

    Args:
        image_score: Of image scores, as a share of the largest absolute score.
        anomaly_map: Of maps, as a share of the range of all maps.
        score_parts: Of the parts of a score, each as a share of its largest absolute value.
        flips: Number of images whose decision differs; None without a calibration.
    """

    image_score: float
    anomaly_map: float | None = None
    score_parts: float | None = None
    flips: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``detector.json``."""
        return asdict(self)

    def describe(self, num_images: int) -> str:
        """Return one line for the screen."""
        parts = []
        if self.anomaly_map is not None:
            parts.append(f"maps differ by at most {self.anomaly_map:.1e} of their range")
        parts.append(f"scores by {self.image_score:.1e}")
        if self.score_parts is not None:
            parts.append(f"their parts by {self.score_parts:.1e}")
        text = ", ".join(parts)
        if self.flips is None:
            return f"{text}; without a calibration, no decisions to compare"
        return f"{text}; {self.flips} of {number_of(num_images, 'decision')} differ"


def batches_of(num_images: int) -> list[int]:
    """Return the batch sizes that are compared: 1, 3 and all.

    Example:
        >>> from anomaly_clip.exporting.parity import batches_of
        >>> batches_of(8), batches_of(2)
        ([1, 3, 8], [1, 2])
    """
    return sorted({1, min(3, num_images), num_images})


def eager_run(graph: DetectorGraph) -> Run:
    """Return a graph as torch runs it, operation by operation."""
    device = graph.method.device

    def run(images: NDArray[np.uint8]) -> Arrays:
        with torch.no_grad():
            outputs = graph(torch.from_numpy(images).to(device))
        return dict(zip(graph.names, (tensor.cpu().numpy() for tensor in outputs), strict=True))

    return run


def outputs_of(run: Run, images: NDArray[np.uint8], batch_size: int) -> dict[str, Any]:
    """Return the outputs of all images ``(N, 3, S, S)``, computed in batches."""
    starts = range(0, len(images), batch_size)
    parts = [run(images[start : start + batch_size]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def decision_scores(
    outputs: Arrays, part_ranges: Sequence[Sequence[float]] | None
) -> NDArray[np.float64]:
    """Return the scores ``(N,)`` that a calibration decides by.

    Args:
        outputs: Outputs of a program.
        part_ranges: Ranges of the parts of scores in the calibration; None if they have no parts.
    """
    if part_ranges is None:
        return outputs["image_score"].astype(np.float64)
    return scaled_score(outputs["score_parts"], part_ranges)


def tolerance_of(record: CategoryCalibration) -> float:
    """Return how far a score must exceed a threshold, and calibration scores, to be above them."""
    return ROUNDING * max(map(abs, record.scores))


def num_flips(
    expected: Arrays, outputs: Arrays, record: CategoryCalibration, threshold: float
) -> int:
    """Return the number of images that a program decides otherwise than torch."""
    is_anomalous = decision_scores(expected, record.part_ranges) > threshold
    is_called = decision_scores(outputs, record.part_ranges) - tolerance_of(record) > threshold
    return int((is_anomalous != is_called).sum())


def compare(
    expected: Arrays,
    run: Run,
    images: NDArray[np.uint8],
    batch_sizes: Sequence[int],
    record: CategoryCalibration | None = None,
    threshold: float = math.nan,
) -> Difference:
    """Compare a program with the outputs of torch.

    Args:
        expected: Outputs of torch.
        run: The program.
        images: uint8 ``(N, 3, S, S)``.
        batch_sizes: Batch sizes to try; the largest difference counts.
        record: Calibration of the category; None without one.
        threshold: Its threshold.
    """
    largest: dict[str, float] = {}
    flips = None
    for size in batch_sizes:
        outputs = outputs_of(run, images, size)
        for name in OUTPUTS:
            if name in expected:
                difference = _difference(name, expected[name], outputs[name])
                largest[name] = max(largest.get(name, 0.0), difference)
        if record is not None:
            flips = max(flips or 0, num_flips(expected, outputs, record, threshold))
    return Difference(**largest, flips=flips)


def _difference(name: str, expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    if name == "anomaly_map":
        scale: Any = wide.max() - wide.min() or np.abs(wide).max()  # maps may be constant
    else:
        scale = np.abs(wide).max(axis=0)
    return float((np.abs(wide - other) / np.where(scale > 0, scale, 1.0)).max())


def constant_outputs(outputs: Arrays) -> list[str]:
    """Return the names of outputs that are the same for all images, which a comparison needs.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.exporting.parity import constant_outputs
        >>> constant_outputs({"image_score": np.ones(2), "anomaly_map": np.eye(2)})
        ['image_score']
    """
    return [name for name, values in outputs.items() if not np.ptp(values, axis=0).any()]


def check_difference(
    difference: Difference, program: str, bounds: Mapping[str, float] = BOUNDS
) -> None:
    """Check that a program is within bounds.

    Args:
        difference: See :func:`compare`.
        program: Description of the program, for the message.
        bounds: Largest differences by name of output; default: those of float32.

    Raises:
        UserError: If it is not.
    """
    for name, bound in bounds.items():
        value = getattr(difference, name)
        if value is not None and not value <= bound:
            raise UserError(
                f"{program} differs from torch: {name} by {value:.1e} of its range, more than the "
                f"bound of {bound:g}, so that nothing was written: try the other --format, or "
                f"another --opset"
            )
