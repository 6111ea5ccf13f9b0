"""Chart of the drift over the images of a run: the martingale of each category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anomaly_clip.reporting.charts import HEIGHT, MAX_LINES, NUM_COLOURS, WIDTH, Chart, ChartLine

__all__ = ["ALARM", "build_drift_chart"]

ALARM = 2.0
"""Logarithm (base 10) of the martingale at the alarm."""
MAX_POINTS = 200
"""Maximum number of points of a line."""
STEP = 2
"""Distance of the ticks, in powers of ten."""


def build_drift_chart(
    drift: Mapping[str, Sequence[float]], names: Sequence[str]
) -> tuple[Chart, float] | None:
    """Return the chart, and the place of the alarm on its vertical axis; None without drift.

    Args:
        drift: Logarithm (base 10) of the martingale after each image, by category; the categories
            with the largest values are drawn.
        names: Categories in the order of the page.
    """
    numbers = {name: number for number, name in enumerate(names)}
    recorded = {name: values for name, values in drift.items() if values and name in numbers}
    if not recorded:
        return None
    longest = max(map(len, recorded.values()))
    low = STEP * min(-1, int(min(map(min, recorded.values())) // STEP))
    high = STEP * max(2, int(max(map(max, recorded.values())) // STEP) + 1)

    def height(value: float) -> float:
        return (high - value) / (high - low) * HEIGHT

    lines: list[ChartLine] = []
    chosen = sorted(recorded, key=lambda name: -max(recorded[name]))[:MAX_LINES]
    for name in sorted(chosen, key=numbers.__getitem__):
        values = _thinned(recorded[name])
        points = " ".join(f"{n / longest * WIDTH:.1f},{height(v):.1f}" for n, v in values)
        number = len(lines)
        style = f"colour-{number % NUM_COLOURS} dash-{number // NUM_COLOURS}"
        title = f"{name}, at most {max(recorded[name]):.3g}"
        lines.append(ChartLine(numbers[name], points, title, style))
    powers = range(low, high + 1, STEP * max(1, (high - low) // (4 * STEP)))
    halves = sorted({0, longest // 2, longest})
    return (
        Chart(
            "drift",
            "Drift",
            "number of images",
            "",
            [(count / longest * WIDTH, f"{count:,}") for count in halves],
            [(height(power), f"1e{power}" if power else "1") for power in powers],
            lines,
        ),
        height(ALARM),
    )


def _thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """Return numbers and values of evenly spaced images, of which each is the highest so far."""
    size = -(-len(values) // MAX_POINTS)
    blocks = (range(start, min(start + size, len(values))) for start in range(0, len(values), size))
    highest = [max(block, key=values.__getitem__) for block in blocks]
    return [(0, 0.0), *((index + 1, values[index]) for index in highest)]
