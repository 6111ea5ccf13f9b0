"""Simulate calibration, decisions and drift, compare with exact rates, and print one JSON line.

    python benchmarks/conformal.py
    python benchmarks/conformal.py --quick

False-alarm rates: 10,000 calibration sets per number of images, for continuous scores, heavily tied
scores, and sums of two parts that are scaled by the ranges of other images; and the wrong way, by
the ranges of the calibration images themselves. The rate of each set is exact, as the distribution
of new scores is given. p-values are compared with a literal transcription and with crepes. Drift:
10,000 streams without a change, streams with a shift, and the p-values of decisions, which must not
be used for it. Few images: a nearest-neighbour detector, calibrated in folds. Seeds are fixed; one
core takes a few minutes. The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import Bound, at_least, at_most, parser, report
from numpy.typing import NDArray
from scipy.stats import beta, norm

from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.conformal import (
    average_rate,
    guaranteed_rate,
    p_values,
    rank_of,
    threshold_of,
)
from anomaly_clip.decisions.cross_conformal import cross_p_values, pooled, proven_rate
from anomaly_clip.decisions.drift import ALARM, EPSILON, martingale_log10, online_p_values
from anomaly_clip.decisions.sentences import guarantee

Floats = NDArray[np.float64]

SEED = 28
NUM_IMAGES = (19, 40, 59, 100, 299, 300)
ALPHAS = (0.05, 0.01, 0.001)
TIES = 0.3
"""Probability that a tied score is 0; others follow the geometric distribution."""
SPREADS = np.array([1.0, 3.0])
"""Standard deviations of the two parts of a score."""
PARTS_SHARE = 1 / 3
"""Fraction of the held-out images that give the ranges of parts, as in the package."""
QUANTILE_ERROR = 5.0
"""Largest relative difference of a quantile from the exact one, times the root of the sets."""
FALSE_ALARMS = 0.01
"""Ville's bound on the fraction of unchanged streams that raise an alarm."""
CALIBRATED, STREAM, BEFORE = 100, 1000, 200
"""Calibration images of a stream, its images, and its images before a shift."""
SHIFTS = (1.0, 2.0, 4.0)
EXPONENTS: dict[str, float | None] = {"epsilon 0.92": EPSILON, "mixture": None}


def shortened(value: float | int) -> float | int:
    """Return a number of six digits; integers and truth values stay."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def standard_errors(rate: float, count: int) -> float:
    """Return three binomial standard errors."""
    return 3 * math.sqrt(rate * (1 - rate) / count)


def continuous(rng: np.random.Generator, sets: int, n: int) -> tuple[Floats, Callable[..., Floats]]:
    """Return uniform scores ``(sets, n)``, and the probability that a new score is above."""
    return rng.random((sets, n)), lambda threshold: 1 - threshold


def tied(rng: np.random.Generator, sets: int, n: int) -> tuple[Floats, Callable[..., Floats]]:
    """Return scores with few different values."""
    return rng.geometric(TIES, (sets, n)).astype(float), lambda level: (1 - TIES) ** level


def scaled(
    rng: np.random.Generator, sets: int, n: int, own_ranges: bool = False
) -> tuple[Floats, Callable[..., Floats]]:
    """Return sums of two normal parts, each scaled by its range over other images."""
    parts = rng.normal(size=(sets, n, 2)) * SPREADS
    others = parts
    if not own_ranges:
        num_others = max(2, round(n * PARTS_SHARE / (1 - PARTS_SHARE)))
        others = rng.normal(size=(sets, num_others, 2)) * SPREADS
    low, width = others.min(axis=1, keepdims=True), np.ptp(others, axis=1, keepdims=True)
    scores = ((parts - low) / width).sum(axis=2)
    mean = (-low / width).sum(axis=2)[:, 0]  # of a new score, given the ranges
    deviation = np.sqrt(((SPREADS / width) ** 2).sum(axis=2))[:, 0]
    return scores, lambda threshold: norm.sf((threshold - mean) / deviation)


WRONG = "ranges of the calibration images"
KINDS: dict[str, Callable[..., tuple[Floats, Callable[..., Floats]]]] = {
    "continuous": continuous,
    "tied": tied,
    "scaled parts": scaled,
    WRONG: partial(scaled, own_ranges=True),
}


def false_alarm_rates(sets: int) -> dict[str, dict[str, Any]]:
    """Return the average rate and the fraction of sets beyond the guarantee, for each cell."""
    cells: dict[str, dict[str, Any]] = {}
    for number, (kind, draw) in enumerate(KINDS.items()):
        for n in NUM_IMAGES:
            scores, rate_above = draw(np.random.default_rng([SEED, number, n]), sets, n)
            ascending = np.sort(scores, axis=1)
            for alpha in ALPHAS:
                k = rank_of(alpha, n)
                record = CategoryCalibration(tuple(ascending[0]))
                level = record.level(alpha)
                refused = "cannot be had" in guarantee(record, level)
                assert refused == (k == 0) == (not level.is_as_asked), (n, alpha)
                assert level.threshold == threshold_of(scores[0], level.k)
                rates = np.asarray(rate_above(ascending[:, -level.k]))
                guaranteed = guaranteed_rate(level.k, n)
                exact = beta(level.k, n + 1 - level.k)
                cells[f"{kind}, n {n}, alpha {alpha}"] = {
                    "k": k,
                    "refused": refused,
                    "average": float(rates.mean()),
                    "average_error": float(rates.std() / math.sqrt(sets)),
                    "average_exact": average_rate(level.k, n),
                    "quantile_95": float(np.quantile(rates, 0.95)),
                    "quantile_95_exact": float(exact.ppf(0.95)),
                    "guaranteed": guaranteed,
                    "beyond": float((rates > guaranteed).mean()),
                }
    return cells


def rate_bounds(cells: dict[str, dict[str, Any]], sets: int) -> dict[str, Bound]:
    """Return bounds on the worst cell of each kind."""
    bounds = {}
    for kind in KINDS:
        chosen = [cell for name, cell in cells.items() if name.startswith(f"{kind},")]
        excess = max(
            (cell["average"] - cell["average_exact"]) / cell["average_error"] for cell in chosen
        )
        if kind == WRONG:
            average = cells[f"{kind}, n 19, alpha 0.05"]["average"]
            limit = 0.05 + 3 * cells[f"{kind}, n 19, alpha 0.05"]["average_error"]
            bounds[f"{kind}: average rate of 5 %, n 19"] = at_least(average, limit)
            continue
        bounds[f"{kind}: average above the exact one, in standard errors"] = at_most(excess, 3)
        beyond = max(cell["beyond"] for cell in chosen)
        limit = 0.05 + standard_errors(0.05, sets)
        bounds[f"{kind}: fraction of sets beyond the guarantee"] = at_most(beyond, limit)
        if kind == "continuous":
            relative = max(abs(c["quantile_95"] / c["quantile_95_exact"] - 1) for c in chosen)
            bounds[f"{kind}: 95 % quantile, relative difference from Beta"] = at_most(
                relative, QUANTILE_ERROR / math.sqrt(sets)
            )
    return bounds


def p_value_differences(sets: int) -> dict[str, float]:
    """Return the largest differences of p-values from a transcription and from crepes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from crepes import ConformalClassifier

    largest = {"transcription": 0.0, "crepes": 0.0}
    for number in range(sets):
        rng = np.random.default_rng([SEED, 10, number])
        n = int(rng.integers(1, 200))
        values = rng.normal(size=n) if number % 2 else rng.integers(0, 5, n).astype(float)
        new = np.concatenate([rng.normal(size=30), rng.choice(values, 30), rng.integers(-1, 6, 30)])
        p = p_values(new, values)
        literal = [(1 + sum(value >= score for value in values)) / (n + 1) for score in new]
        classifier = ConformalClassifier()
        classifier.fit(values)
        crepes = classifier.predict_p(new[:, None], smoothing=False)[:, 0]
        largest["transcription"] = max(largest["transcription"], abs(p - literal).max())
        largest["crepes"] = max(largest["crepes"], abs(p - crepes).max())
    return {name: float(value) for name, value in largest.items()}


def plain_online(calibration: Floats, streams: Floats, draws: Floats) -> Floats:
    """Return online p-values of many streams ``(s, m)``, by comparing all pairs of scores."""
    seen = np.concatenate([calibration, streams], axis=1).astype(np.float32)
    n, p = calibration.shape[1], np.empty(streams.shape)
    for index in range(streams.shape[1]):
        earlier, new = seen[:, : n + index], seen[:, n + index, None]
        above = np.count_nonzero(earlier > new, axis=1)
        equal = np.count_nonzero(earlier == new, axis=1) + 1
        p[:, index] = (above + draws[:, index] * equal) / (n + index + 1)
    return p


def stream_scores(
    rng: np.random.Generator, kind: str, count: int, length: int
) -> tuple[Floats, Floats]:
    """Return calibration scores and streams; float32 represents them exactly."""
    scores = rng.normal(size=(count, CALIBRATED + length))
    scores = np.round(scores) if kind == "tied" else scores.astype(np.float32).astype(float)
    return scores[:, :CALIBRATED], scores[:, CALIBRATED:]


def alarms(p: Floats, epsilon: float | None) -> NDArray[np.int64]:
    """Return the index of the first alarm of each stream, or the length without one."""
    passed = martingale_log10(p, epsilon) >= math.log10(ALARM)
    return np.where(passed.any(axis=1), passed.argmax(axis=1), p.shape[1])


def drift(num_streams: int) -> dict[str, Any]:
    """Return false alarms of unchanged streams, and delays after a shift."""
    chunk = 100
    unchanged: dict[str, float] = {}
    fastest_difference = 0.0
    for kind in ("continuous", "tied"):
        counts = dict.fromkeys(
            (*EXPONENTS, *(f"{name}, p-values of decisions" for name in EXPONENTS)), 0
        )
        for number in range(num_streams // chunk):
            rng = np.random.default_rng([SEED, 20, kind == "tied", number])
            calibration, streams = stream_scores(rng, kind, chunk, STREAM)
            draws = 1 - rng.random(streams.shape)
            draws[0] = 1 - np.random.Generator(np.random.PCG64(number)).random(STREAM)
            p = plain_online(calibration, streams, draws)
            fast = online_p_values(streams[0], calibration[0], number)
            fastest_difference = max(fastest_difference, float(abs(p[0] - fast).max()))
            fixed = np.array([p_values(*pair) for pair in zip(streams, calibration, strict=True)])
            for name, epsilon in EXPONENTS.items():
                counts[name] += int((alarms(p, epsilon) < STREAM).sum())
                counts[f"{name}, p-values of decisions"] += int(
                    (alarms(fixed, epsilon) < STREAM).sum()
                )
        unchanged |= {f"{kind}, {name}": count / num_streams for name, count in counts.items()}
    delays = {}
    for shift in SHIFTS:
        rng = np.random.default_rng([SEED, 30, int(shift)])
        calibration, streams = stream_scores(
            rng, "continuous", max(chunk, num_streams // 10), STREAM
        )
        streams[:, BEFORE:] += shift
        p = plain_online(calibration, streams, 1 - rng.random(streams.shape))
        for name, epsilon in EXPONENTS.items():
            first = alarms(p, epsilon)
            delay = first[first >= BEFORE] - BEFORE + 1
            delays[f"shift {shift}, {name}"] = {
                "detected": float(((first >= BEFORE) & (first < STREAM)).mean()),
                "median_images": float(np.median(delay)),
                "quantile_90_images": float(np.quantile(delay, 0.9)),
            }
    return {
        "unchanged_streams": num_streams,
        "images": STREAM,
        "calibration_images": CALIBRATED,
        "false_alarms": unchanged,
        "delays": delays,
        "largest_difference_of_fast_form": fastest_difference,
    }


def nearest(points: Floats, fitted: Floats) -> Floats:
    """Return distances ``(..., m)`` of points to the nearest of the fitted points."""
    gaps = np.linalg.norm(points[..., :, None, :] - fitted[..., None, :, :], axis=-1)
    return np.asarray(gaps.min(axis=-1))


def few_images(rounds: int) -> dict[str, Any]:
    """Return false-alarm rates of a nearest-neighbour detector with 40 images in 5 folds."""
    n, num_folds, alpha, new, size = 40, 5, 0.05, 20, 5
    rng = np.random.default_rng([SEED, 40])
    by_all = by_refit = 0.0
    for _ in range(rounds):
        images, fresh = rng.normal(size=(n, size)), rng.normal(size=(new, size))
        parts = np.array_split(rng.permutation(n), num_folds)
        rest = [np.setdiff1d(np.arange(n), part) for part in parts]
        folds = [nearest(images[p], images[r]) for p, r in zip(parts, rest, strict=True)]
        columns = np.stack([nearest(fresh, images[r]) for r in rest], axis=1)  # (new, K)
        by_all += float((cross_p_values(columns, folds) <= alpha).mean()) / rounds
        threshold = pooled(folds).level(alpha).threshold
        by_refit += float((nearest(fresh, images) > threshold).mean()) / rounds
    return {
        "images": n,
        "folds": num_folds,
        "alpha": alpha,
        "rate_of_all_models": by_all,
        "proven_rate_of_all_models": proven_rate(alpha, n, num_folds),
        "rate_of_one_refit": by_refit,
    }


def main() -> int:
    """Run the simulations and return the exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="a twentieth of the simulations")
    sets = 500 if arguments.parse_args().quick else 10_000
    start = time.process_time()
    cells = false_alarm_rates(sets)
    differences = p_value_differences(max(20, sets // 50))
    streams = drift(sets)
    few = few_images(sets // 5)
    bounds = rate_bounds(cells, sets)
    for name, value in differences.items():
        bounds[f"p-values, largest difference from {name}"] = at_most(value, 1e-12)
    limit = FALSE_ALARMS + standard_errors(FALSE_ALARMS, sets)
    for name, value in streams["false_alarms"].items():
        if "decisions" not in name:
            bounds[f"drift, false alarms: {name}"] = at_most(value, limit)
        elif name.startswith("continuous"):
            bounds[f"drift, false alarms: {name}"] = at_least(value, limit)
    bounds["drift, fast form: largest difference of p-values"] = at_most(
        streams["largest_difference_of_fast_form"], 1e-12
    )
    bounds["few images, rate of all models"] = at_most(
        few["rate_of_all_models"], few["proven_rate_of_all_models"]
    )
    values = {
        "calibration_sets": sets,
        "seconds": round(time.process_time() - start, 1),
        "cells": {name: {k: shortened(v) for k, v in cell.items()} for name, cell in cells.items()},
        "p_value_differences": differences,
        "drift": streams,
        "few_images": few,
    }
    return report("conformal", values, bounds)


if __name__ == "__main__":
    sys.exit(main())
