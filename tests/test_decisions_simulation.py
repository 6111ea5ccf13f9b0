"""A small run of the simulations of ``benchmarks/conformal.py``, with fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SETS = 2000


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield import_module("conformal")


def test_rates_hold_on_average_and_guarantees_for_most_sets(simulation: ModuleType) -> None:
    cells = simulation.false_alarm_rates(SETS)
    assert len(cells) == 4 * 6 * 3
    assert sum(cell["refused"] for cell in cells.values()) == 4 * (6 + 3)  # 0.1 %, and 1 % below 99
    bounds = simulation.rate_bounds(cells, SETS)
    missed = {name: bound for name, bound in bounds.items() if not bound["met"]}
    assert missed == {}
    # The wrong way breaks the average also with more images.
    wrong = cells[f"{simulation.WRONG}, n 40, alpha 0.05"]
    assert wrong["average"] > wrong["average_exact"]


def test_the_rate_of_each_draw_is_that_of_new_scores(simulation: ModuleType) -> None:
    """The exact rates of the simulation, by drawing."""
    new = np.random.default_rng(5).geometric(simulation.TIES, 100_000)
    _, rate_above = simulation.tied(np.random.default_rng(0), 1, 10)
    assert rate_above(np.array([3.0])) == pytest.approx((new > 3).mean(), abs=0.01)
    rng = np.random.default_rng(6)
    scores, rate_above = simulation.scaled(rng, 1, 50_000)
    threshold = np.quantile(scores[0], 0.9)
    assert rate_above(np.array([threshold]))[0] == pytest.approx(0.1, abs=0.01)


def test_p_values_equal_those_of_crepes_and_of_the_definition(simulation: ModuleType) -> None:
    pytest.importorskip("crepes")
    assert max(simulation.p_value_differences(10).values()) < 1e-12


def test_drift_is_rare_without_a_change_and_fast_after_one(
    simulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "STREAM", 400)
    content = simulation.drift(300)
    limit = 0.01 + simulation.standard_errors(0.01, 300)
    for name, rate in content["false_alarms"].items():
        if "decisions" not in name:
            assert rate <= limit, name
    assert content["false_alarms"]["continuous, epsilon 0.92, p-values of decisions"] > limit
    assert content["largest_difference_of_fast_form"] < 1e-12
    assert content["delays"]["shift 4.0, mixture"]["median_images"] < 30


def test_few_images_are_close_to_the_rate(simulation: ModuleType) -> None:
    content = simulation.few_images(150)
    assert 0.02 < content["rate_of_one_refit"] < 0.06
    assert 0.02 < content["rate_of_all_models"] < 0.06 < content["proven_rate_of_all_models"]
