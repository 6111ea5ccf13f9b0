"""Swept parameters: the distributions of W&B sweep files, and sampling from them.

A sample depends only on the seed, the number of the run and the name of the parameter, not on other
runs or parameters.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from anomaly_clip.errors import suggest

__all__ = ["Parameter", "read_parameter"]

BOUNDS, BELL = ("min", "max"), ("mu", "sigma")
SETTINGS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "int_uniform": BOUNDS,
    **{
        f"{quantised}{name}": settings + (("q",) if quantised else ())
        for quantised in ("", "q_")
        for name, settings in {
            "uniform": BOUNDS,
            "log_uniform": BOUNDS,
            "log_uniform_values": BOUNDS,
            "normal": BELL,
            "log_normal": BELL,
        }.items()
    },
    "inv_log_uniform": BOUNDS,
    "inv_log_uniform_values": BOUNDS,
}
"""Settings of each distribution."""
DEFAULTS = {"mu": 0.0, "sigma": 1.0, "q": 1}
EXTREMES = (0.5 / 2**52, 1 - 0.5 / 2**52)  # lowest and highest quantile level that can be sampled
POWER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""Numbers that YAML 1.1 reads as strings if the decimal point or the exponent's sign is missing."""


@dataclass(frozen=True)
class Parameter:
    """Distribution of an option.

    Args:
        distribution: W&B's name of the distribution.
        values: Values of ``constant`` and ``categorical``.
        weights: Probabilities of these values.
        settings: Settings of the other distributions, such as their bounds.
    """

    distribution: str
    values: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()
    settings: Mapping[str, float] | None = None

    def quantile(self, level: float) -> Any:
        """Return the quantile at ``level``, between 0 and 1.

        Example:
            >>> from anomaly_clip.commands.sweep_parameter import Parameter
            >>> rate = Parameter("log_uniform_values", settings={"min": 1e-4, "max": 1e-2})
            >>> round(rate.quantile(0.5), 6)
            0.001
        """
        if self.settings is None:
            sums = itertools.accumulate(self.weights)
            above = (value for value, below in zip(self.values, sums, strict=True) if level < below)
            return next(above, self.values[-1])
        settings, kind = self.settings, self.distribution.removeprefix("q_")
        if kind in ("normal", "log_normal"):
            sample = NormalDist(settings["mu"], settings["sigma"]).inv_cdf(level)
        else:
            low, high = settings["min"], settings["max"]
            if kind == "int_uniform":
                return int(low) + int(level * (high - low + 1))
            if kind.endswith("_values"):
                low, high = math.log(low), math.log(high)
            if kind == "inv_log_uniform":  # the bounds are those of log(1 / x)
                low, high = -high, -low
            sample = low + level * (high - low)
        if "log" in kind:
            sample = math.exp(sample)
        if kind.endswith("_values"):  # exp(log(x)) may differ from x
            sample = min(max(sample, settings["min"]), settings["max"])
        step = settings.get("q")
        return sample if step is None else round(sample / step) * step

    def draw(self, seed: int, run: int, name: str) -> Any:
        """Sample the value of a run."""
        rng = np.random.default_rng([seed, run, zlib.crc32(name.encode())])
        return self.quantile((int(rng.integers(2**52)) + 0.5) / 2**52)  # neither 0 nor 1


def read_parameter(name: str, given: Any) -> Parameter:
    """Read an entry of ``parameters``.

    Raises:
        ValueError: If it is invalid.
    """
    where = f"parameters.{name}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a mapping, such as {{value: {given}}}, got {given}")
    if "parameters" in given:
        inner = next(iter(given["parameters"] or ["lr"]))
        raise ValueError(f"{where}: nested parameters are not supported: write {name}.{inner}")
    if name in ("output.root", "output.name", "output.folder"):
        raise ValueError(f"{where}: a sweep chooses the folder of each run: leave the option out")
    kind = _distribution(where, given)
    allowed = SETTINGS[kind]
    unknown = [key for key in given if key not in (*allowed, "distribution")]
    missing = [key for key in allowed if key not in {*given, *DEFAULTS, "probabilities"}]
    if unknown or missing:
        mistake = f"has no {unknown[0]}" if unknown else f"requires {missing[0]}"
        raise ValueError(f"{where}: {kind} {mistake}: its settings are {' and '.join(allowed)}")
    if kind in ("constant", "categorical"):
        return _categorical(where, kind, given)
    settings = {
        key: _number(f"{where}.{key}", given.get(key, DEFAULTS.get(key))) for key in allowed
    }
    _check_settings(where, kind, settings)
    parameter = Parameter(kind, settings=settings)
    try:
        for level in EXTREMES:
            parameter.quantile(level)
    except OverflowError:
        raise ValueError(
            f"{where}: samples of {kind} with {settings} would overflow: its settings are "
            f"exponents; for bounds of the value itself, use log_uniform_values"
        ) from None
    return parameter


def _distribution(where: str, given: Mapping[str, Any]) -> str:
    """Return the given distribution, or the one that W&B would infer."""
    if "distribution" in given:
        kind = str(given["distribution"])
        if kind not in SETTINGS:
            hint = suggest(kind, SETTINGS)
            raise ValueError(f"{where}: distribution {kind} is not supported; {hint}".rstrip("; "))
        return kind
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical"
    if not set(BOUNDS) & set(given):
        raise ValueError(
            f"{where}: expected value, values, min and max, or distribution, got {dict(given)}"
        )
    return "int_uniform" if all(isinstance(given.get(key), int) for key in BOUNDS) else "uniform"


def _categorical(where: str, kind: str, given: Mapping[str, Any]) -> Parameter:
    values = [given["value"]] if kind == "constant" else given["values"]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}.values: expected a list of at least one value, got {values}")
    for value in values:
        if value is None:
            raise ValueError(
                f"{where}: W&B passes null as None, which the command line reads as text: use a "
                f"separate sweep that leaves this option out"
            )
        if isinstance(value, str) and POWER.fullmatch(value):
            _number(where, value)
    weights = given.get("probabilities") or [1 / len(values)] * len(values)
    if not isinstance(weights, list) or len(weights) != len(values):
        raise ValueError(
            f"{where}.probabilities: expected a list of {len(values)}, one per value, got {weights}"
        )
    numbers = tuple(_number(f"{where}.probabilities", weight) for weight in weights)
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(
            f"{where}.probabilities: expected 0 or more, and a sum of 1, got {weights}"
        )
    return Parameter(kind, tuple(values), numbers)


def _number(where: str, value: Any) -> float:
    if isinstance(value, str) and POWER.fullmatch(value):
        digits, exponent = re.split("[eE]", value)
        meant = f"{digits}{'' if '.' in digits else '.0'}e{int(exponent):+d}"
        raise ValueError(f"{where}: YAML reads {value} as text, not as a number: write {meant}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a number, got {value}")
    return value


def _check_settings(where: str, kind: str, settings: Mapping[str, float]) -> None:
    """Check that a distribution can be sampled.

    Raises:
        ValueError: If a setting is out of range.
    """
    for key in ("sigma", "q"):
        if key in settings and settings[key] <= 0:
            raise ValueError(f"{where}.{key}: expected more than 0, got {settings[key]}")
    if "min" not in settings:
        return
    low, high = settings["min"], settings["max"]
    if low > high:
        raise ValueError(f"{where}: min {low} is above max {high}: swap them")
    if kind == "int_uniform" and not all(isinstance(bound, int) for bound in (low, high)):
        raise ValueError(
            f"{where}: int_uniform requires whole numbers without a decimal point, got {low} and "
            f"{high}; for fractions, use distribution uniform"
        )
    if kind.endswith("_values") and low <= 0:
        raise ValueError(f"{where}.min: {kind} requires more than 0, got {low}")
