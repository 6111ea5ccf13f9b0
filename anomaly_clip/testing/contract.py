"""``check_method``: the checks that every method passes, alone and in runs of the command line.

A check is a function of a :class:`~anomaly_clip.testing.subject.Subject` that raises an
``AssertionError`` with a sentence if the method breaks a promise. With pytest::

    from anomaly_clip.testing import check_method

    CHECKS = check_method(MyMethod, arguments={"backbone": {"weights": "random"}})

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_contract(check):
        check()
"""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule

from anomaly_clip.errors import UserError, check_at_least, suggest
from anomaly_clip.testing.subject import Subject

__all__ = ["Check", "Outcome", "check_method", "contract_table", "run_checks"]

Status = Literal["passed", "failed", "expected failure", "unexpected pass", "not applicable"]
MARKS: dict[Status, str] = {
    "passed": "yes",
    "failed": "FAILED",
    "expected failure": "no",
    "unexpected pass": "PASSES",
    "not applicable": "",
}
"""Cells of :func:`contract_table`."""


@dataclass(frozen=True)
class Check:
    """One promise of a method.

    Calling it runs it. It raises an ``AssertionError`` if the method breaks the promise, and
    ``unittest.SkipTest``, which pytest reports as skipped, if it does not apply or fails as
    expected.
    """

    name: str
    function: Callable[[Subject], None]
    subject: Subject
    expected_failure: str | None = None
    """Reason why the method is known to break this promise."""

    @property
    def description(self) -> str:
        """The promise, in one line."""
        return str(inspect.getdoc(self.function)).partition("\n")[0]

    @property
    def slow(self) -> bool:
        """True if the check starts processes or runs several commands."""
        return bool(getattr(self.function, "slow", False))

    def run(self) -> Outcome:
        """Run the check and return its outcome; only Ctrl-C and the like are raised."""
        try:
            self.function(self.subject)
        except unittest.SkipTest as skip:
            return Outcome(self, "not applicable", str(skip))
        except Exception as error:
            message = str(error)
            if not message or not isinstance(error, (AssertionError, UserError)):
                message = f"{type(error).__name__}: {message}".removesuffix(": ")
            if self.expected_failure is not None:
                return Outcome(self, "expected failure", self.expected_failure, error)
            return Outcome(self, "failed", message, error)
        if self.expected_failure is not None:
            message = f"{self.name} passes: remove it from expected_failures"
            return Outcome(self, "unexpected pass", message)
        return Outcome(self, "passed", "")

    def __call__(self) -> None:
        """Run the check; see the class."""
        outcome = self.run()
        if outcome.status in ("not applicable", "expected failure"):
            raise unittest.SkipTest(f"{outcome.status}: {outcome.message}")
        if outcome.error is not None:
            raise outcome.error
        if outcome.status != "passed":
            raise AssertionError(outcome.message)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """Outcome of a check."""

    check: Check
    status: Status
    message: str
    """Reason why the check failed or does not apply."""
    error: Exception | None = None


def check_method(
    method: LightningModule | type[LightningModule],
    *,
    arguments: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    half_precision_bound: float = 0.05,
    slow: bool | None = None,
) -> list[Check]:
    """Return the checks of a method; nothing runs before they are called.

    All checks of one call share a fit and a test on a small data set, which the first check that
    needs them runs. They may be called in any order.

    Args:
        method: The class of the method, or an instance, whose recorded hyper-parameters are used.
            It must be importable, as for ``--model my_module.MyMethod``.
        arguments: Arguments of the constructor as plain values, as in a configuration. They
            override those of an instance.
        data: Options of the data module, as in a configuration. Without ``class_path`` they are
            added to those of the default: two categories of generated images in MVTec-AD's layout.
        trainer: Options of the trainer; default: two epochs on the CPU.
        expected_failures: Reasons by name of the checks that the method is known not to pass. A
            check that passes nevertheless counts as failed.
        half_precision_bound: Largest difference between maps or scores with a bf16 backbone and
            those in float32, as a fraction of their range over the test images.
        slow: True: only the checks that start processes or run several commands. False: all
            others. Default: both.

    Raises:
        ValueError: If the method is none, an expected failure names no check or has no reason, or
            another argument is of the wrong kind.
    """
    given = {"arguments": arguments, "data": data, "trainer": trainer}
    for name, value in {**given, "expected_failures": expected_failures}.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a dictionary, got {value!r}")
    if slow not in (None, True, False):
        raise ValueError(f"slow: expected True, False or None, got {slow!r}")
    check_at_least("half_precision_bound", half_precision_bound, 0)
    subject = Subject.of(method, arguments, data, trainer, half_precision_bound)
    failures = dict(expected_failures or {})
    functions = {function.__name__: function for function in _functions()}
    for name, cause in failures.items():
        if name not in functions:
            raise ValueError(
                f"expected_failures: there is no check {name!r}: {suggest(str(name), functions)}"
            )
        if not isinstance(cause, str) or not cause.strip():
            raise ValueError(f"expected_failures: {name} needs a reason in words, got {cause!r}")
    checks = [
        Check(name, function, subject, failures.get(name)) for name, function in functions.items()
    ]
    return [check for check in checks if slow is None or check.slow == slow]


def run_checks(checks: Iterable[Check]) -> list[Outcome]:
    """Run checks and return their outcomes."""
    return [check.run() for check in checks]


def contract_table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return a Markdown table of checks x methods, with the reasons of exceptions below.

    Args:
        outcomes: The outcomes of the same checks, by method.
    """
    names = list(dict.fromkeys(o.check.name for column in outcomes.values() for o in column))
    lines = [
        f"| check | {' | '.join(outcomes)} |",
        f"|---|{'---|' * len(outcomes)}",
    ]
    by_method = {
        method: {outcome.check.name: outcome for outcome in column}
        for method, column in outcomes.items()
    }
    for name in names:
        cells = [
            MARKS[column[name].status] if name in column else "" for column in by_method.values()
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    reasons = [
        f"- {method}, `{outcome.check.name}`: {outcome.message}"
        for method, column in outcomes.items()
        for outcome in column
        if outcome.status not in ("passed", "not applicable")
    ]
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def _functions() -> list[Callable[[Subject], None]]:
    """Return all checks, in the order of their modules."""
    from anomaly_clip.testing import (
        calibration_checks,
        checkpoint_checks,
        command_checks,
        export_checks,
        process_checks,
        score_checks,
        settings_checks,
    )

    modules = (
        settings_checks,
        score_checks,
        command_checks,
        checkpoint_checks,
        calibration_checks,
        export_checks,
        process_checks,
    )
    return [getattr(module, name) for module in modules for name in module.__all__]
